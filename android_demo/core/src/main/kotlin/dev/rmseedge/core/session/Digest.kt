package dev.rmseedge.core.session

import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.pack.hex
import java.security.MessageDigest

internal const val SHA256 = "sha256"

private val LINE_BREAK = "\n".toByteArray()

/**
 * SHA-256 over a session's header without its own hash and all tensors. `runtimes/host/session.py` says what is hashed in which order;
 * sessions go from one runtime to the other.
 */
internal fun digest(tensors: Map<String, Tensor>, header: Map<String, String>): String {
    val found = MessageDigest.getInstance("SHA-256")
    for ((name, text) in (header - SHA256).toSortedMap()) {
        val value = text.toByteArray()
        found.update("$name ${value.size}\n".toByteArray())
        found.update(value)
        found.update(LINE_BREAK)
    }
    for ((name, tensor) in tensors.toSortedMap()) {
        found.update("$name ${tensor.spec.dtype.label} ${tensor.spec.shape.joinToString("x")}\n".toByteArray())
        found.update(tensor.bytes.duplicate())
        found.update(LINE_BREAK)
    }
    return found.digest().hex()
}
