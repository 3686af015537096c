package dev.rmseedge.core.host

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.TextException
import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.model.TensorSpec

/** A looped language model, loaded, that remembers what it was fed. For one thread at a time. */
interface LoopRuntime : AutoCloseable {
    val info: ModelInfo

    /** The engine's name and version, as benches report it. */
    val engine: String

    /** Threads that one call may use; null: the engine's own choice. */
    val threads: Int?

    /** Tokens fed since [reset]. */
    val position: Long

    /** Of what the model begins from, where that is noise. */
    var noiseSeed: ULong

    /** Bytes that are kept between calls; they grow with the text where something is appended. */
    val stateBytes: Long

    /** What became of the memory that experts may take; null: it is not bounded. */
    val experts: ExpertFigures?

    /** False after a call that was broken off: what is kept belongs to no moment of the text. */
    val whole: Boolean

    /** Forgets everything. */
    fun reset()

    /**
     * Continues the text.
     *
     * @param allLogits those of every token instead of the last one's.
     * @param prefix how many of a text's first tokens see each other whatever their order; for models that have prefixes.
     * @param goOn is asked before every call but the first: false stops reading there, between two tokens.
     * @throws TextException there are no tokens, one is outside the vocabulary, or the text would be too long.
     */
    @Throws(TextException::class, PackageException::class)
    fun feed(tokens: IntArray, dials: Dials = info.dials, allLogits: Boolean = false, prefix: Int = 0, goOn: () -> Boolean = { true }): Fed

    /** Runs the loop of [rows] rows alone for as long as [again] says so, behind whatever was fed; `reset` it afterwards. */
    fun timeLoop(tokens: IntArray, rows: Int, dials: Dials, again: () -> Boolean)

    /** All that is kept, as sessions store it. */
    fun tensors(): Map<String, Tensor>

    /** Goes on from what [tensors] gave at [position]; forms were compared before. */
    fun restore(position: Long, tensors: Map<String, Tensor>)
}

/** Shapes and types of what [LoopRuntime.tensors] gives at a position. */
internal fun LoopRuntime.forms(position: Long): Map<String, TensorSpec> =
    keptTensors(info).mapValues { (_, spec) -> spec.filled(info, position) }

/**
 * What became of the memory that experts may take, all in bytes but the rate.
 *
 * @property total of all experts.
 * @property budget that they may take.
 * @property hitRate share of the needed experts that were in memory when they were needed; null: none was needed yet.
 */
class ExpertFigures(val total: Long, val budget: Long, val hitRate: Double?)
