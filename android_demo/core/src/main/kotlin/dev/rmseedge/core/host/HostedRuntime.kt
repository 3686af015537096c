package dev.rmseedge.core.host

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.TextException
import dev.rmseedge.core.engine.Engine
import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.model.Dial
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.model.Dtype
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.model.TensorSpec
import dev.rmseedge.core.model.givenTensors
import dev.rmseedge.core.pack.LoopPackage

/**
 * A looped language model that remembers what it was fed, over the methods of a package.
 *
 * Everything that is kept between calls is the host's: rings and appended rows in their slots, states that are replaced, the memory
 * that is written once per segment. For one thread at a time.
 */
class LoopRuntime(val pack: LoopPackage, private val engine: Engine) : AutoCloseable {
    val info: ModelInfo = pack.info

    /** Tokens fed since [reset]. */
    var position = 0L
        private set

    /** False: the memory learns nothing more. */
    var remember = true

    /** Of what the model begins from, where that is noise. */
    var noiseSeed = 0uL

    /** False after a call that was broken off: what is kept belongs to no moment of the text. */
    internal var whole = true
        private set

    private val kept = Kept(info)
    private val dials = Dial.ALL.associate { it.name to Tensor(TensorSpec(it.name, it.dtype, emptyList())) }
    private val memory: Memory?
    private val calls: Map<Int, Calls>

    init {
        val given = givenTensors(info, info.chunks.first())
        listOf("segment", "retrieved", "retrieved_scores", "retrieved_valid").mapNotNull(given::get).forEach(kept::add)
        val shared = SharedTensors(kept, dials)
        calls = info.chunks.associateWith { Calls(engine, pack, it, shared, kept::slots) }
        memory = if (info.memory.isEmpty()) null else Memory(engine, pack, kept)
        reset()
    }

    /** Bytes that are kept between calls; they grow with the text where something is appended. */
    val stateBytes: Long get() = kept.nbytes

    /** Forgets everything. */
    fun reset() {
        growTo(0)
        kept.reset()
        position = 0
        whole = true
    }

    /**
     * Continues the text.
     *
     * @param allLogits those of every token instead of the last one's.
     * @param prefix how many of a text's first tokens see each other whatever their order; for models that have prefixes.
     * @param goOn is asked before every call but the first: false stops reading there, between two tokens.
     * @throws TextException there are no tokens, one is outside the vocabulary, or the text would be too long.
     */
    @Throws(TextException::class, PackageException::class)
    fun feed(
        tokens: IntArray,
        dials: Dials = info.dials,
        allLogits: Boolean = false,
        prefix: Int = 0,
        goOn: () -> Boolean = { true },
    ): Fed {
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

    /** Runs the loop of [rows] rows alone for as long as [again] says so, behind whatever was fed; `reset` it afterwards. */
    internal fun timeLoop(tokens: IntArray, rows: Int, dials: Dials, again: () -> Boolean) {
        set(info.check(dials))
        val calls = calls.getValue(rows)
        whole = false
        calls.run(tokens, 0, rows, position, noiseSeed, prefix = 0, withHead = false)
        while (again()) calls.repeatLoop()
    }

    /** All that is kept, as sessions store it. */
    internal fun tensors(): Map<String, Tensor> = kept.filled(position)

    /** Shapes and types of what [tensors] gives at a position. */
    internal fun forms(position: Long): Map<String, TensorSpec> = kept.forms(position)

    /** Goes on from what [tensors] gave at [position]; forms were compared before. */
    internal fun restore(position: Long, tensors: Map<String, Tensor>) {
        growTo(position)
        kept.restore(tensors)
        this.position = position
        whole = true
    }

    override fun close() {
        calls.values.forEach(Calls::close)
        memory?.close()
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
        if (memory != null && remember && position % info.segment!! == 0L) reading.learned(position, memory.learn())
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
