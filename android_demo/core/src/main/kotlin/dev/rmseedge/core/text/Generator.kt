package dev.rmseedge.core.text

import dev.rmseedge.core.host.LoopRuntime

/**
 * One run of the model on one prompt.
 *
 * @param prompt tokens to feed, of which the stream of [before] knows the first [told].
 * @param prefix how many of them see each other whatever their order.
 */
internal class Generator(
    private val runtime: LoopRuntime,
    private val decoder: Decodes,
    private val prompt: List<Int>,
    private val told: Int,
    private val prefix: Int,
    private val settings: GenerationSettings,
    private val control: GenerationControl,
    private val before: Tail,
) {
    private val sampler = Sampler(settings.sampling)
    private val stream = TextStream(decoder, settings.stop, before).apply { skip(prompt.drop(told)) }
    private val eos = if (settings.ignoreEos) emptyList() else runtime.info.text.eosTokenIds
    private val tokens = mutableListOf<Int>()
    private val depth = mutableListOf<Int>()
    private val seconds = mutableListOf<Double>()
    private var promptDepth = IntArray(0)

    /** Tokens of the text that were not fed. */
    var pending: List<Int> = prompt
        private set

    /** Where the text has got to. */
    val tail: Tail get() = stream.tail

    /** The text of the first [count] tokens, whatever ended it included: a stop string, the token that ends a text. */
    fun text(count: Int): String {
        val whole = TextStream(decoder, tail = before).apply { skip(prompt.drop(told)) }
        return (tokens.take(count).flatMap { whole.push(it, 1) } + whole.finish()).joinToString("") { it.text }
    }

    fun run(onToken: (TokenEvent) -> Unit): GenerationStatistics {
        val reason = steps(onToken)
        return GenerationStatistics(
            reason,
            rest = stream.finish(whole = false),
            promptDepth,
            tokens.toIntArray(),
            depth.toIntArray(),
            timeToFirstToken = seconds.firstOrNull(),
            seconds.drop(1).toDoubleArray(),
            runtime.info.maxLoops,
        )
    }

    private fun steps(onToken: (TokenEvent) -> Unit): FinishReason {
        val longest = runtime.info.longest
        while (tokens.size < settings.maxNewTokens) {
            if (control.stopped) return FinishReason.INTERRUPTED
            if (tokens.isNotEmpty() && longest != null && runtime.position >= longest) return FinishReason.MAX_SEQ_LEN
            val start = System.nanoTime()
            val fed = runtime.feed(pending.toIntArray(), control.dials, prefix = if (tokens.isEmpty()) prefix else 0) { !control.stopped }
            if (tokens.isEmpty()) promptDepth = fed.depth
            pending = pending.drop(fed.depth.size)
            if (pending.isNotEmpty()) return FinishReason.INTERRUPTED // between two pieces of the prompt
            val token = sampler.pick(fed.logits, runtime.info.text.unusedTokenIds)
            take(token, fed.depth.last(), (System.nanoTime() - start) / 1e9, onToken)
            if (token in eos) return FinishReason.EOS
            if (stream.stopped) return FinishReason.STOP
        }
        return FinishReason.LENGTH
    }

    private fun take(token: Int, loops: Int, spent: Double, onToken: (TokenEvent) -> Unit) {
        pending = listOf(token)
        tokens += token
        depth += loops
        seconds += spent
        val spans = if (token in eos) emptyList() else stream.push(token, loops)
        onToken(TokenEvent(tokens.lastIndex, token, loops, spent, spans))
    }
}
