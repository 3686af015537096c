package dev.rmseedge.core.text

import dev.rmseedge.core.measure.Summary
import dev.rmseedge.core.model.Dials

/**
 * What a text is to be.
 *
 * @property stop strings that end it, of which nothing is given out.
 * @property ignoreEos whether to go on behind the model's own end of a text.
 * @property prefix whether a prompt at the beginning of a text is a prefix, of models that have them.
 */
data class GenerationSettings(
    val maxNewTokens: Int = 256,
    val sampling: Sampling = Sampling(),
    val stop: List<String> = emptyList(),
    val ignoreEos: Boolean = false,
    val prefix: Boolean = true,
)

/** What another thread may change while a text is being generated. */
class GenerationControl(dials: Dials) {
    /** Read before every token: what is set acts at once. */
    @Volatile
    var dials: Dials = dials

    /** Whether generating is to end. */
    @Volatile
    var stopped = false
        private set

    /** Ends generating behind the token, or the piece of a prompt, that is being computed. */
    fun stop() {
        stopped = true
    }
}

/**
 * One generated token.
 *
 * @property index counted from 0.
 * @property depth iterations of the position whose logits produced it.
 * @property seconds that it took: the first one's are the time to the first token, the prompt included.
 * @property spans text that is certain now; none while a character is incomplete.
 */
class TokenEvent(val index: Int, val token: Int, val depth: Int, val seconds: Double, val spans: List<Span>)

/** Why a text ended; [label] as `rmse-run -o json` has it. */
enum class FinishReason(val label: String) {
    LENGTH("length"),
    EOS("eos"),
    STOP("stop"),
    MAX_SEQ_LEN("max_seq_len"),
    INTERRUPTED("interrupted"),
}

/**
 * What generating a text took.
 *
 * @property rest text that was held back, and that nothing more will follow.
 * @property promptDepth iterations of each position of the prompt.
 * @property depth iterations behind each generated token.
 * @property latency seconds per token, of all but the first; null where there are none.
 */
class GenerationStatistics internal constructor(
    val finishReason: FinishReason,
    val rest: List<Span>,
    val promptDepth: IntArray,
    val tokens: IntArray,
    val depth: IntArray,
    val timeToFirstToken: Double?,
    seconds: DoubleArray,
    private val maxLoops: Int,
) {
    val latency: Summary? = if (seconds.isEmpty()) null else Summary.of(seconds)
    val tokensPerSecond: Double? = if (seconds.isEmpty()) null else seconds.size / seconds.sum()
    val promptTokensPerSecond: Double? = timeToFirstToken?.let { promptDepth.size / it }
    val meanLoops: Double? = if (depth.isEmpty()) null else depth.average()

    /** The share of iterations that full depth would have run and these did not. */
    val iterationsSaved: Double? = meanLoops?.let { 1 - it / maxLoops }

    /** How many generated tokens have depth 1, 2, ... */
    val histogram: IntArray = IntArray(maxLoops).also { counts -> for (loops in depth) counts[loops - 1]++ }

    /** Under the names of `rmse-run -o json`, for `Json.write`. */
    fun toMap(): Map<String, Any?> = linkedMapOf(
        "prompt_tokens" to promptDepth.size,
        "prompt_mean_loops" to if (promptDepth.isEmpty()) null else promptDepth.average(),
        "prompt_tokens_per_s" to promptTokensPerSecond,
        "time_to_first_token_s" to timeToFirstToken,
        "generated_tokens" to tokens.size,
        "tokens_per_s" to tokensPerSecond,
        "token_s" to latency?.toMap(),
        "mean_loops" to meanLoops,
        "max_loops" to maxLoops,
        "iterations_saved" to iterationsSaved,
        "histogram" to histogram.toList(),
        "finish_reason" to finishReason.label,
    )
}
