package dev.rmseedge.core.host

import dev.rmseedge.core.engine.Engine
import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.model.Dial
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.model.Dtype
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.model.TensorSpec
import dev.rmseedge.core.pack.LoopPackage

/**
 * A model whose host is this app, over the methods of a package.
 *
 * Everything that is kept between calls is the host's: rings and appended rows in their slots, states that are replaced, the memory
 * that is written once per segment.
 *
 * @param methods of the package; closed with the runtime.
 */
class HostedRuntime(private val pack: LoopPackage, private val methods: Engine) : LoopRuntime {
    override val info: ModelInfo = pack.info
    override val engine: String get() = methods.description
    override val threads: Int? get() = methods.threads
    override var position = 0L
        private set
    override var noiseSeed = 0uL
    override var whole = true
        private set
    override val experts: ExpertFigures? get() = null

    private val kept = Kept(info)
    private val dials = Dial.ALL.associate { it.name to Tensor(TensorSpec(it.name, it.dtype, emptyList())) }
    private val memory: Memory?
    private val calls: Map<Int, Calls>

    init {
        val shared = SharedTensors(kept, dials)
        calls = info.chunks.associateWith { Calls(methods, pack, it, shared, kept::slots) }
        memory = if (info.memory.isEmpty()) null else Memory(methods, pack, kept)
        reset()
    }

    override val stateBytes: Long get() = kept.nbytes

    override fun reset() {
        growTo(0)
        kept.reset()
        position = 0
        whole = true
    }

    override fun feed(tokens: IntArray, dials: Dials, allLogits: Boolean, prefix: Int, goOn: () -> Boolean): Fed {
        checkTokens(info, position, tokens)
        checkPrefix(info, position, tokens.size, prefix)
        set(info.check(dials))
        val reading = Reading(info.text.vocabSize, tokens.size, allLogits)
        whole = false
        for (call in planCalls(info, position, tokens.size, prefix)) {
            if (reading.count > 0 && !goOn()) break
            run(call, tokens, prefix, reading)
        }
        whole = true
        return reading.fed()
    }

    override fun timeLoop(tokens: IntArray, rows: Int, dials: Dials, again: () -> Boolean) {
        set(info.check(dials))
        val calls = calls.getValue(rows)
        whole = false
        calls.run(tokens, 0, rows, position, noiseSeed, prefix = 0, withHead = false)
        while (again()) calls.repeatLoop()
    }

    override fun tensors(): Map<String, Tensor> = kept.filled(position)

    override fun restore(position: Long, tensors: Map<String, Tensor>) {
        growTo(position)
        kept.restore(tensors)
        this.position = position
        whole = true
    }

    override fun close() {
        calls.values.forEach(Calls::close)
        memory?.close()
        methods.close()
    }

    /** One call, and all that is done behind it. */
    private fun run(call: PlannedCall, tokens: IntArray, prefix: Int, reading: Reading) {
        val calls = calls.getValue(call.rows)
        val head = reading.wantsHead(call.tokens)
        val loops = calls.run(tokens, reading.count, call.tokens, position, noiseSeed, prefix, head)
        reading.take(calls, call.tokens, loops)
        growTo(position + call.tokens)
        kept.update(position, call.tokens, calls::made)
        position += call.tokens
        if (memory != null && position % info.segment!! == 0L) reading.learned(position, memory.learn())
    }

    private fun growTo(positions: Long) {
        if (kept.grow(positions)) calls.values.forEach(Calls::bindGrown)
    }

    private fun set(dials: Dials) {
        for (dial in Dial.ALL) {
            val tensor = this.dials.getValue(dial.name)
            val value = dials[dial.name]
            if (dial.dtype == Dtype.INT64) tensor.longs.put(0, value.toLong()) else tensor.floats.put(0, value.toFloat())
        }
    }
}

/** The tensors that calls of all sizes read, wherever those that grow lie just now. */
private class SharedTensors(private val kept: Kept, private val dials: Map<String, Tensor>) : AbstractMap<String, Tensor>() {
    override val entries: Set<Map.Entry<String, Tensor>> get() = (dials + kept.all).entries

    override fun get(key: String): Tensor? = dials[key] ?: kept.all[key]
}
