package dev.rmseedge.core.session

import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.pack.hex
import java.security.MessageDigest

internal const val SHA256 = "sha256"

/**
 * SHA-256 over a session's header without its own hash and all tensors, by name, type, shape and bytes. The header and the shapes are
 * hashed as Python writes them, since sessions go from one runtime to the other.
 */
internal fun digest(tensors: Map<String, Tensor>, header: Map<String, String>): String {
    val found = MessageDigest.getInstance("SHA-256")
    val members = (header - SHA256).toSortedMap().map { (name, value) -> "(${pythonRepr(name)}, ${pythonRepr(value)})" }
    found.update(members.joinToString(prefix = "[", postfix = "]").toByteArray())
    for ((name, tensor) in tensors.toSortedMap()) {
        found.update("$name ${tensor.spec.dtype.label} ${pythonTuple(tensor.spec.shape)}".toByteArray())
        found.update(tensor.bytes.duplicate())
    }
    return found.digest().hex()
}

private fun pythonTuple(sizes: List<Int>): String = sizes.joinToString(prefix = "(", postfix = if (sizes.size == 1) ",)" else ")")

/** A string as Python's `repr` writes it. */
internal fun pythonRepr(text: String): String = buildString {
    val quote = if ('\'' in text && '"' !in text) '"' else '\''
    append(quote)
    var i = 0
    while (i < text.length) {
        val point = text.codePointAt(i)
        i += Character.charCount(point)
        when {
            point == quote.code || point == '\\'.code -> append('\\').appendCodePoint(point)
            point == '\n'.code -> append("\\n")
            point == '\r'.code -> append("\\r")
            point == '\t'.code -> append("\\t")
            isPrintable(point) -> appendCodePoint(point)
            point < 0x100 -> append("\\x%02x".format(point))
            point < 0x10000 -> append("\\u%04x".format(point))
            else -> append("\\U%08x".format(point))
        }
    }
    append(quote)
}

/** What Python's `str.isprintable` says: neither one of Unicode's "Other" nor a separator, but for the space. */
private fun isPrintable(point: Int): Boolean = point == ' '.code || when (Character.getType(point).toByte()) {
    Character.CONTROL, Character.FORMAT, Character.SURROGATE, Character.PRIVATE_USE, Character.UNASSIGNED -> false
    Character.LINE_SEPARATOR, Character.PARAGRAPH_SEPARATOR, Character.SPACE_SEPARATOR -> false
    else -> true
}
