package dev.rmseedge.core.runner

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.host.ExpertFigures
import dev.rmseedge.core.host.Fed
import dev.rmseedge.core.host.Kept
import dev.rmseedge.core.host.LoopRuntime
import dev.rmseedge.core.host.checkPrefix
import dev.rmseedge.core.host.checkTokens
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.long
import dev.rmseedge.core.json.number
import dev.rmseedge.core.model.Dial
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.pack.LoopPackage

/**
 * A model of an ExecuTorch package. Its host is the native runner, whole: one host of a loop per engine, and none of them twice.
 *
 * @param expertMemory what the package's experts may take: a size (`300M`), a share of them (`25%`) or `auto`; null: they are read where
 *   the system has mapped them.
 */
class RunnerRuntime(pack: LoopPackage, override val threads: Int? = null, expertMemory: String? = null) : LoopRuntime {
    override val info: ModelInfo = pack.info
    override val engine: String get() = "executorch-native"
    private val handle = asked { RunnerLibrary.open(pack.folder.path.toByteArray(), threads ?: 0, expertMemory?.toByteArray()) }
    override val position: Long get() = RunnerLibrary.position(handle)
    override var whole = true
        private set
    override var noiseSeed = 0uL
        set(seed) {
            RunnerLibrary.setNoiseSeed(handle, seed.toLong())
            field = seed
        }
    override val stateBytes: Long get() = RunnerLibrary.stateBytes(handle)

    override val experts: ExpertFigures?
        get() {
            val found = RunnerLibrary.experts(handle, maxOf(1, position))?.toString(Charsets.UTF_8) ?: return null
            val figures = Fields(Json.parse(found))
            val bytes = long(0..Long.MAX_VALUE)
            return ExpertFigures(figures.at("expert_bytes", bytes), figures.at("budget_bytes", bytes), figures.orNull("hit_rate", number))
        }

    override fun reset() {
        asked { RunnerLibrary.reset(handle) }
        whole = true
    }

    override fun feed(tokens: IntArray, dials: Dials, allLogits: Boolean, prefix: Int, goOn: () -> Boolean): Fed {
        checkTokens(info, position, tokens)
        checkPrefix(info, position, tokens.size, prefix)
        val values = values(info.check(dials))
        whole = false
        val (logits, depth, iterations, positions, surprises) =
            asked { RunnerLibrary.feed(handle, tokens, values, allLogits, prefix, Asked(goOn)) }
        whole = true
        val learned = (positions as LongArray).zip((surprises as FloatArray).asIterable()).toMap()
        return Fed(logits as FloatArray, ints(depth), ints(iterations), learned)
    }

    override fun timeLoop(tokens: IntArray, rows: Int, dials: Dials, again: () -> Boolean) {
        whole = false
        asked {
            RunnerLibrary.prepareLoop(handle, tokens.copyOf(rows), values(info.check(dials)))
            RunnerLibrary.runLoop(handle)
            while (again()) RunnerLibrary.runLoop(handle)
        }
    }

    override fun tensors(): Map<String, Tensor> {
        val position = position
        val kept = Kept(info).apply { grow(position) }
        for ((name, tensor) in kept.all) asked { RunnerLibrary.read(handle, name.toByteArray(), tensor.bytes) }
        return kept.filled(position)
    }

    override fun restore(position: Long, tensors: Map<String, Tensor>) {
        val kept = Kept(info).apply { grow(position) }
        kept.restore(tensors)
        whole = false
        asked {
            RunnerLibrary.resume(handle, position)
            for ((name, tensor) in kept.all) RunnerLibrary.write(handle, name.toByteArray(), tensor.bytes)
        }
        whole = true
    }

    override fun close() = RunnerLibrary.close(handle)

    private fun values(dials: Dials) = DoubleArray(Dial.ALL.size) { dials[Dial.ALL[it].name] }

    private fun ints(numbers: Any) = (numbers as LongArray).let { longs -> IntArray(longs.size) { longs[it].toInt() } }

    private fun <T> asked(work: () -> T): T = try {
        work()
    } catch (error: RunnerException) {
        throw PackageException(error.message.orEmpty(), error)
    }
}
