package dev.rmseedge.core.json

import com.google.gson.stream.JsonReader
import com.google.gson.stream.JsonToken
import com.google.gson.stream.JsonWriter
import com.google.gson.stream.MalformedJsonException
import java.io.ByteArrayOutputStream
import java.io.EOFException
import java.io.File
import java.io.IOException
import java.io.StringReader
import java.io.StringWriter
import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

/** A text is not JSON, or holds another value than was expected; the message says which, without the file's name. */
class JsonException(message: String) : Exception(message)

/**
 * JSON as every reader of packages understands it: UTF-8, every name once per object, finite numbers, not nested without end.
 *
 * Values are `Map<String, Any?>`, `List<Any?>`, `String`, `Boolean`, `null`, `Long` for numbers written without a fraction and
 * exponent, and `Double` for all others.
 */
object Json {
    /** Bytes of a manifest, a tokenizer, a list of hashes: more is not read. */
    const val LARGEST = 16 shl 20
    private const val DEEPEST = 32

    /** The value that a file holds, of which no more than [LARGEST] bytes are read. */
    @Throws(JsonException::class, IOException::class)
    fun read(file: File): Any? = parse(readText(file))

    /** The text of a small file. */
    @Throws(JsonException::class, IOException::class)
    fun readText(file: File): String = file.inputStream().use { input ->
        val bytes = ByteArrayOutputStream()
        val piece = ByteArray(1 shl 16)
        while (true) {
            val count = input.read(piece)
            if (count < 0) break
            bytes.write(piece, 0, count)
            if (bytes.size() > LARGEST) throw JsonException("larger than ${LARGEST shr 20} MiB, which no such file is")
        }
        decode(bytes.toByteArray())
    }

    /** Text of bytes that are UTF-8. */
    @Throws(JsonException::class)
    fun decode(bytes: ByteArray): String = try {
        Charsets.UTF_8
            .newDecoder()
            .onMalformedInput(CodingErrorAction.REPORT)
            .onUnmappableCharacter(CodingErrorAction.REPORT)
            .decode(ByteBuffer.wrap(bytes))
            .toString()
    } catch (_: CharacterCodingException) {
        throw JsonException("not UTF-8")
    }

    /** The value that [text] stands for. */
    @Throws(JsonException::class)
    fun parse(text: String): Any? {
        if (text.startsWith('\uFEFF')) throw JsonException("begins with a byte order mark")
        val reader = JsonReader(StringReader(text))
        try {
            val value = value(reader, 0)
            if (reader.peek() != JsonToken.END_DOCUMENT) throw JsonException("more than one value")
            return value
        } catch (error: MalformedJsonException) {
            throw JsonException(firstLine(error))
        } catch (_: EOFException) {
            throw JsonException("it ends too early")
        } catch (error: IOException) {
            throw JsonException(firstLine(error))
        }
    }

    /** [value], of the types above and whole numbers of any kind, on one line. */
    fun write(value: Any?): String = StringWriter().also { write(JsonWriter(it), value) }.toString()

    private fun value(reader: JsonReader, depth: Int): Any? {
        if (depth > DEEPEST) throw JsonException("nested more than $DEEPEST deep")
        return when (reader.peek()) {
            JsonToken.BEGIN_OBJECT -> members(reader, depth)
            JsonToken.BEGIN_ARRAY -> items(reader, depth)
            JsonToken.STRING -> whole(reader.nextString())
            JsonToken.NUMBER -> number(reader.nextString())
            JsonToken.BOOLEAN -> reader.nextBoolean()
            JsonToken.NULL -> null.also { reader.nextNull() }
            else -> throw JsonException("a value is missing")
        }
    }

    private fun members(reader: JsonReader, depth: Int): Map<String, Any?> = buildMap {
        reader.beginObject()
        while (reader.hasNext()) {
            val name = whole(reader.nextName())
            if (name in this) throw JsonException("${quoted(name)} occurs twice in one object")
            put(name, value(reader, depth + 1))
        }
        reader.endObject()
    }

    private fun items(reader: JsonReader, depth: Int): List<Any?> = buildList {
        reader.beginArray()
        while (reader.hasNext()) add(value(reader, depth + 1))
        reader.endArray()
    }

    private fun number(written: String): Number {
        if (written.none { it in ".eE" }) written.toLongOrNull()?.let { return it }
        return written.toDouble().also { if (!it.isFinite()) throw JsonException("a number is too large") }
    }

    /** A string, unless it has half a surrogate pair, which nothing could write as UTF-8. */
    private fun whole(text: String): String {
        var i = 0
        while (i < text.length) {
            val point = text.codePointAt(i)
            if (point in 0xD800..0xDFFF) throw JsonException("half of a character in a string")
            i += Character.charCount(point)
        }
        return text
    }

    private fun write(writer: JsonWriter, value: Any?) {
        writer.serializeNulls = true
        when (value) {
            null -> writer.nullValue()

            is Map<*, *> -> {
                writer.beginObject()
                for ((name, part) in value) write(writer.name(name as String), part)
                writer.endObject()
            }

            is Iterable<*> -> {
                writer.beginArray()
                for (part in value) write(writer, part)
                writer.endArray()
            }

            is Boolean -> writer.value(value)

            is Number -> writer.value(value)

            else -> writer.value(value.toString())
        }
    }

    private fun firstLine(error: IOException): String = error.message.orEmpty().lineSequence().first().ifEmpty { "malformed" }
}

/** A value as a message quotes it. */
internal fun quoted(value: Any?): String {
    val text = Json.write(value)
    return if (text.length <= 60) text else text.take(60) + "…"
}
