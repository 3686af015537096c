package dev.rmseedge.core.model

/**
 * What a host needs to know about a model of texts, as the manifest says it.
 *
 * @property rotaryDims channels of each head that turn with the position; 0: the host gives no angles.
 * @property furtherThetas bases of layers that turn by another: the host gives cos_NAME and sin_NAME besides.
 * @property prefix whether a text may begin with positions that see each other whatever their order.
 * @property maxSeqLen tokens of a text at most, by the export; null: any number.
 * @property eosTokenIds each of them ends a text.
 * @property unusedTokenIds ranges of ids without a token, never to be drawn.
 */
data class TextInfo(
    val vocabSize: Int,
    val rotaryDims: Int,
    val ropeTheta: Double,
    val furtherThetas: Map<String, Double>,
    val prefix: Boolean,
    val maxSeqLen: Long?,
    val eosTokenIds: List<Int>,
    val unusedTokenIds: List<IntRange>,
)

/**
 * What a host needs to know about a looped model, from the manifest of its package.
 *
 * @property maxLoops the trained depth, and [untrainedLoops] of its configuration beyond it.
 * @property dials the checkpoint's own settings.
 * @property rules the dials that the model has.
 * @property width channels of the state h.
 * @property nbytes of the package on disk.
 * @property chunks rows of the calls that exist, ascending; the first is 1.
 * @property segment no call crosses a multiple of so many positions; null: calls may begin anywhere.
 * @property methods that the model has, whoever drives the loop.
 * @property page slots by which what is appended grows; null: nothing is appended, or all slots are there from the start.
 * @property noise inputs that are filled with noise: their standard deviation.
 * @property hitRows vectors that may be retrieved at once; 0: the model has no retrieval head.
 * @property loopWeights weights that one token is multiplied with in every loop; [onceWeights]: whatever its depth, once.
 */
data class ModelInfo(
    val name: String,
    val target: String,
    val quant: String,
    val fingerprint: String,
    val maxLoops: Int,
    val untrainedLoops: Int?,
    val dials: Dials,
    val rules: List<String>,
    val width: Int,
    val parameters: Long,
    val nbytes: Long,
    val chunks: List<Int>,
    val segment: Int?,
    val methods: Set<String>,
    val page: Int?,
    val state: Map<String, State>,
    val noise: Map<String, Double>,
    val text: TextInfo,
    val hitRows: Int,
    val loopWeights: Long,
    val onceWeights: Long,
    val bosTokenId: Int?,
) {
    /** The state that is written once per segment; empty: the model has no memory. */
    val memory: Map<String, State> get() = state.filterValues { it.kind == StateKind.WRITTEN }

    /** Positions after which all rings have wrapped; null where nothing wraps. */
    val window: Int? get() = state.values.filter { it.kind == StateKind.RING }.maxOfOrNull { it.slots }

    /** Positions that a text may have at most, for its state; null: any number. */
    val capacity: Int? = state.values.firstOrNull { it.kind == StateKind.APPEND }?.slots

    /** Positions whose state is not larger than [LARGEST_STATE], as far as it grows; null: any number. */
    val room: Int? = capacity?.let { most ->
        if (page == null) return@let most
        val (appended, others) = state.values.partition { it.kind == StateKind.APPEND }
        val slot = appended.sumOf { it.tensor.ofSlots(1).nbytes }
        minOf(most.toLong(), maxOf(0L, LARGEST_STATE - others.sumOf { it.tensor.nbytes }) / slot).toInt()
    }

    /** Tokens that a text may have at most, for its state and for the export; null: any number. */
    val longest: Long? = listOfNotNull(text.maxSeqLen, room?.toLong()).minOrNull()

    /** Slots of the appended state of a text of so many positions; null: nothing is appended. */
    fun slots(positions: Long): Int? {
        if (capacity == null || page == null) return capacity
        val pages = maxOf(1L, (positions + page - 1) / page)
        return minOf(capacity.toLong(), page * pages).toInt()
    }

    /** Bytes of the state behind so many positions. */
    fun keptBytes(positions: Long = 0): Long = slots(positions).let { slots -> state.values.sumOf { it.tensor.ofSlots(slots).nbytes } }

    /** The checkpoint's dials with those given replaced, checked. */
    fun dialsWith(changes: Map<String, Double>): Dials = check(dials.with(changes))

    /** Itself, if the model can run it; otherwise an `ArgumentException` naming the dial and its range. */
    fun check(dials: Dials): Dials = dials.check(maxLoops, untrainedLoops)

    companion object {
        /** Bytes that a model may keep between calls. */
        const val LARGEST_STATE = 4L shl 30
    }
}
