package dev.rmseedge.core.text

import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.flag
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.refuseField
import dev.rmseedge.core.json.whole
import java.util.PriorityQueue
import dev.rmseedge.core.json.text as anyText

/** Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): `model` of a `tokenizer.json` of the type BPE. */
internal class BytePairs(spec: Fields, largestId: Int) {
    val ids: Map<String, Int> = spec.at("vocab", members(whole(0..largestId)))
    private val merges: Map<Long, Merge>
    private val unknown: Int? = spec.orNull("unk_token", anyText)?.let { ids[it] }
    private val fusesUnknown = spec.or(false, "fuse_unk", flag)
    private val takesWholeWords = spec.or(false, "ignore_merges", flag)

    private class Merge(val rank: Int, val id: Int)

    init {
        if (spec.or(false, "byte_fallback", flag)) spec.refuse("byte_fallback", true, "false; such tokenizers are not read here")
        for (affix in listOf("continuing_subword_prefix", "end_of_word_suffix")) {
            val given = spec.orNull(affix, anyText)
            if (!given.isNullOrEmpty()) spec.refuse(affix, given, "none; such tokenizers are not read here")
        }
        merges = buildMap {
            spec.at("merges", items { value, path -> pair(value, path) }).forEachIndexed { rank, (left, right) ->
                val made = ids[left + right]
                val (a, b) = ids[left] to ids[right]
                if (a == null || b == null || made == null) refuseField("model.merges[$rank]", "$left $right", "pieces of the vocabulary")
                put(key(a, b), Merge(rank, made))
            }
        }
    }

    /** Tokens of one word. */
    fun encode(word: String): List<Int> {
        if (takesWholeWords) ids[word]?.let { return listOf(it) }
        return Word(letters(word)).merged()
    }

    private fun letters(word: String): IntArray {
        val found = mutableListOf<Int>()
        var afterUnknown = false
        var i = 0
        while (i < word.length) {
            val end = i + Character.charCount(word.codePointAt(i))
            val known = ids[word.substring(i, end)]
            // What no token stands for is left out where there is no token for that.
            if (known != null) {
                found += known
            } else if (unknown != null && !(afterUnknown && fusesUnknown)) {
                found += unknown
            }
            afterUnknown = known == null
            i = end
        }
        return found.toIntArray()
    }

    /** Tokens in a row, of which neighbours become one: the earliest merge of the list first, from the left. */
    private inner class Word(private val tokens: IntArray) {
        private val next = IntArray(tokens.size) { if (it == tokens.lastIndex) -1 else it + 1 }
        private val previous = IntArray(tokens.size) { it - 1 }
        private val queue = PriorityQueue<Candidate>(compareBy({ it.rank }, { it.left }))

        fun merged(): List<Int> {
            for (left in 0 until tokens.size - 1) consider(left)
            while (queue.isNotEmpty()) merge(queue.poll()!!)
            return tokens.filter { it != GONE } // in their order: the left one of two takes the new one's place
        }

        private fun merge(candidate: Candidate) {
            val left = candidate.left
            val right = next[left]
            if (tokens[left] != candidate.first || right < 0 || tokens[right] != candidate.second) return // one of them is gone
            tokens[left] = candidate.id
            tokens[right] = GONE
            next[left] = next[right]
            if (next[left] >= 0) previous[next[left]] = left
            if (previous[left] >= 0) consider(previous[left])
            consider(left)
        }

        private fun consider(left: Int) {
            val right = next[left]
            if (right < 0) return
            val merge = merges[key(tokens[left], tokens[right])] ?: return
            queue += Candidate(merge.rank, left, tokens[left], tokens[right], merge.id)
        }
    }

    private class Candidate(val rank: Int, val left: Int, val first: Int, val second: Int, val id: Int)

    private companion object {
        const val GONE = -1

        fun key(left: Int, right: Int): Long = left.toLong() shl 32 or right.toLong()

        /** "a b", or a list of the two. */
        fun pair(value: Any?, path: String): Pair<String, String> {
            val two = (value as? String)?.split(' ') ?: (value as? List<*>)?.map { it as? String ?: "" }
            if (two == null || two.size != 2 || two.any(String::isEmpty)) refuseField(path, value, "two pieces of the vocabulary")
            return two[0] to two[1]
        }
    }
}
