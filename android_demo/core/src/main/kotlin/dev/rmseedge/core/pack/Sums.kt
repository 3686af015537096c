package dev.rmseedge.core.pack

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import java.io.File
import java.security.MessageDigest

private val SUM = Regex("([0-9a-f]{64}) [ *](.+)") // hash, mode (text or binary: all the same here), name

/** Hashes by the names of their files, from a list as coreutils' `sha256sum` writes it. */
internal fun readSums(path: String, bytes: ByteArray): Map<String, String> {
    fun fail(number: Int, what: String): Nothing = throw PackageException("$path: line $number: $what; export the package again")
    val text = try {
        Json.decode(bytes)
    } catch (error: JsonException) {
        throw PackageException("$path: not a list of hashes (${error.message}); export the package again", error)
    }
    val digests = linkedMapOf<String, String>()
    text.removeSuffix("\n").split('\n').forEachIndexed { i, line ->
        val (digest, name) = SUM.matchEntire(line)?.destructured ?: fail(i + 1, "no hash and name of a file")
        if (name.any { it.isISOControl() }) fail(i + 1, "no hash and name of a file")
        if (digests.put(name, digest) != null) fail(i + 1, "the same file again")
    }
    if (PackageIndex.MANIFEST !in digests) throw PackageException("$path: lists no ${PackageIndex.MANIFEST}; export the package again")
    return digests
}

/** SHA-256 of [bytes] in hexadecimal digits. */
internal fun sha256(bytes: ByteArray): String = MessageDigest.getInstance("SHA-256").digest(bytes).hex()

/** SHA-256 of a file; [read] is told of every piece how many bytes it has. */
internal fun sha256(file: File, read: (Int) -> Unit = {}): String {
    val digest = MessageDigest.getInstance("SHA-256")
    val piece = ByteArray(1 shl 16)
    file.inputStream().use { input ->
        while (true) {
            val count = input.read(piece)
            if (count < 0) break
            digest.update(piece, 0, count)
            read(count)
        }
    }
    return digest.digest().hex()
}

internal fun ByteArray.hex(): String = joinToString("") { "%02x".format(it) }
