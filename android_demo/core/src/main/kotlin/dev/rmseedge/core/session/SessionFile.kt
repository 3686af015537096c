package dev.rmseedge.core.session

import dev.rmseedge.core.SessionException
import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.host.LoopRuntime
import dev.rmseedge.core.host.forms
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.model.Dtype
import dev.rmseedge.core.model.TensorSpec
import dev.rmseedge.core.text.Tail
import java.io.File
import java.io.IOException
import java.nio.channels.FileChannel
import java.nio.file.Files
import java.nio.file.StandardCopyOption
import java.nio.file.StandardOpenOption

/**
 * What a session says beside the runtime's state.
 *
 * @property pending tokens of the text that were not fed yet: what is fed next begins with them.
 * @property tail where the text has got to, the pending tokens included.
 * @property chat what `rmse-run --chat` keeps of a conversation; empty: the text is none.
 */
data class SessionText(val pending: List<Int> = emptyList(), val tail: Tail = Tail(), val chat: String = "")

/**
 * A session on disk: everything a text has left behind, so that it can go on later, in another process or on another runtime.
 *
 * One safetensors file, the same that `rmse-run --save-session` writes: all that is kept between calls, and, in its header, format
 * version, position, tokens not yet read, the last tokens of the text, the model's fingerprint and a SHA-256 over all of it.
 */
object SessionFile {
    private const val FORMAT = "rmse-edge session"
    private const val VERSION = "3"
    private val NUMBER = Regex("[0-9]{1,15}")
    private val TOKENS = Regex("([0-9]{1,9}( [0-9]{1,9})*)?")

    /** Writes the runtime's state to [file], whole or not at all; only its owner may read it. */
    @Throws(SessionException::class)
    fun save(runtime: LoopRuntime, file: File, text: SessionText) {
        if (!runtime.whole) {
            throw SessionException("$file: not saved, since the text was broken off while the model was reading; run it again")
        }
        val tensors = runtime.tensors()
        val header = linkedMapOf(
            "format" to FORMAT, "version" to VERSION, "model" to runtime.info.fingerprint, "name" to runtime.info.name,
            "position" to "${runtime.position}", "pending" to text.pending.joinToString(" "),
            "context" to text.tail.context.joinToString(" "), "open" to text.tail.open.joinToString(" "), "chat" to text.chat,
        )
        header[SHA256] = digest(tensors, header)
        try {
            val part = Files.createTempFile(file.absoluteFile.parentFile.toPath(), ".${file.name}-", ".part")
            try {
                FileChannel.open(part, StandardOpenOption.WRITE).use { Safetensors.write(it, tensors, header) }
                Files.move(part, file.toPath(), StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING)
            } finally {
                Files.deleteIfExists(part)
            }
        } catch (error: IOException) {
            throw SessionException("$file: cannot be written (${error.message}); free some space", error)
        }
    }

    /** Puts a saved session into [runtime], in place of what it was fed; where it does not fit, nothing is changed. */
    @Throws(SessionException::class)
    fun restore(runtime: LoopRuntime, file: File): SessionText {
        if (!file.isFile) throw SessionException("$file: no such session file; save one first")
        try {
            FileChannel.open(file.toPath(), StandardOpenOption.READ).use { return restore(runtime, file, Safetensors.open(it)) }
        } catch (error: JsonException) {
            throw damaged(file, error)
        } catch (error: IOException) {
            throw damaged(file, error)
        }
    }

    private fun restore(runtime: LoopRuntime, file: File, stored: Safetensors): SessionText {
        val header = stored.metadata
        if (header["format"] != FORMAT) throw SessionException("$file: not a session file; save one first")
        if (header["version"] != VERSION) {
            throw SessionException("$file: session version ${header["version"]}, and this app reads $VERSION; start a new one")
        }
        val info = runtime.info
        if (info.fingerprint.isEmpty() || header["model"] != info.fingerprint) {
            throw SessionException(
                "$file: a session of another model (${header["name"].orEmpty().take(200)}), not of ${info.name}; start a new one",
            )
        }
        val position = field(file, header, "position", NUMBER).toLong()
        val most = info.longest
        if (most != null && position > most) {
            throw SessionException("$file: position: got $position, and ${info.name} takes $most tokens at most; start a new session")
        }
        val (pending, context, open) = listOf("pending", "context", "open").map { tokens(file, header, it, info.text.vocabSize) }
        checkForms(file, stored.forms, runtime.forms(position), info.name) // so that no more is read than the model keeps anyway
        val tensors = stored.forms.keys.associateWith(stored::read)
        if (header[SHA256] != digest(tensors, header)) {
            throw SessionException("$file: its SHA-256 does not fit; the file is damaged, start a new session")
        }
        tensors.values.forEach { checkNumbers(file, it) }
        runtime.restore(position, tensors)
        return SessionText(pending, Tail(context, open), header["chat"].orEmpty())
    }

    private fun field(file: File, header: Map<String, String>, name: String, form: Regex): String {
        val value = header[name].orEmpty()
        if (form.matches(value)) return value
        val expected = if (form == NUMBER) "a number of tokens" else "tokens"
        throw SessionException("$file: $name: got '${value.take(60)}', expected $expected; start a new session")
    }

    private fun tokens(file: File, header: Map<String, String>, name: String, vocabSize: Int): List<Int> {
        val tokens = field(file, header, name, TOKENS).split(' ').filter(String::isNotEmpty).map(String::toInt)
        tokens.firstOrNull { it >= vocabSize }?.let {
            throw SessionException("$file: $name: got token $it, expected some below $vocabSize; start a new session")
        }
        return tokens
    }

    private fun checkForms(file: File, found: Map<String, TensorSpec?>, known: Map<String, TensorSpec>, model: String) {
        for (name in (known.keys + found.keys).sorted()) {
            val (got, expected) = found[name] to known[name]
            if (got != null && expected != null && got.fits(expected)) continue
            val said = if (name !in found) "none" else "${got ?: "one of another type"}"
            throw SessionException(
                "$file: its tensors are not those of $model ($name: got $said, expected ${expected ?: "none"}); start a new session",
            )
        }
    }

    private fun checkNumbers(file: File, tensor: Tensor) {
        val dtype = tensor.spec.dtype
        val fits = when (dtype) {
            Dtype.FLOAT32 -> (0 until tensor.floats.capacity()).all { tensor.floats[it].isFinite() }
            Dtype.FLOAT16 -> (0 until tensor.nbytes step dtype.nbytes).all { isFiniteHalf(tensor.bytes.getShort(it)) }
            Dtype.BOOL -> (0 until tensor.nbytes).all { tensor.bytes[it] in 0..1 }
            else -> true
        }
        if (fits) return
        val what = if (dtype == Dtype.BOOL) "flags that are neither true nor false" else "numbers that are not finite"
        throw SessionException("$file: ${tensor.spec.name}: holds $what; start a new session")
    }

    /** A float16 whose exponent is not all ones. */
    private fun isFiniteHalf(bits: Short): Boolean = bits.toInt() and 0x7C00 != 0x7C00

    private fun damaged(file: File, error: Exception) =
        SessionException("$file: damaged (${error.message.orEmpty().lineSequence().first()}); start a new session", error)
}
