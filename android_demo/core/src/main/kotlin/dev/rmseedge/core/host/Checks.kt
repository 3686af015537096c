package dev.rmseedge.core.host

import dev.rmseedge.core.ArgumentException
import dev.rmseedge.core.TextException
import dev.rmseedge.core.model.ModelInfo

/** Fails where [tokens] cannot continue a text of [position] tokens. */
internal fun checkTokens(info: ModelInfo, position: Long, tokens: IntArray) {
    if (tokens.isEmpty()) throw TextException("no tokens to run; give a prompt of at least one token")
    tokens.firstOrNull { it !in 0 until info.text.vocabSize }?.let {
        throw TextException("token $it is outside the vocabulary (0..${info.text.vocabSize - 1})")
    }
    val count = position + tokens.size
    val limit = info.text.maxSeqLen
    if (limit != null && count > limit) {
        throw TextException(
            "$count tokens are more than the $limit this package was exported for (rmse-export --max-seq-len); shorten the prompt, " +
                "begin a new text, or export again",
        )
    }
    val room = info.room ?: return
    if (count > room) {
        val why = if (room == info.capacity) "attends to" else "can keep in 4 GiB"
        throw TextException("$count tokens are more than the $room that ${info.name} $why; shorten the text, or begin a new one")
    }
}

/** Fails where the first [prefix] of [count] tokens cannot be read as a prefix. */
internal fun checkPrefix(info: ModelInfo, position: Long, count: Int, prefix: Int) {
    fun refuse(problem: String): Nothing = throw ArgumentException("prefix", problem)
    if (prefix == 0) return
    if (!info.text.prefix) refuse("${info.name} has none: each of its positions sees those before it")
    if (position > 0) refuse("is the beginning of a text, and $position tokens were fed before")
    if (prefix !in 0..count) refuse("got $prefix, expected 0..$count, of the tokens that are fed")
    val most = minOf(info.chunks.last(), info.segment ?: info.chunks.last())
    if (prefix > most) refuse("$prefix tokens are more than the $most that one call of ${info.name} has; shorten it, or leave it out")
}
