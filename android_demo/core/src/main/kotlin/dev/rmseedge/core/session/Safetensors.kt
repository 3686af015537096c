package dev.rmseedge.core.session

import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.json.Fields
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.json.JsonException
import dev.rmseedge.core.json.fields
import dev.rmseedge.core.json.items
import dev.rmseedge.core.json.long
import dev.rmseedge.core.json.members
import dev.rmseedge.core.json.text
import dev.rmseedge.core.json.whole
import dev.rmseedge.core.model.Dtype
import dev.rmseedge.core.model.TensorSpec
import java.io.EOFException
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.channels.FileChannel

private const val METADATA = "__metadata__"
private val NAMES = mapOf("F32" to Dtype.FLOAT32, "F16" to Dtype.FLOAT16, "I8" to Dtype.INT8, "I64" to Dtype.INT64, "BOOL" to Dtype.BOOL)

/**
 * A safetensors file: the length of a JSON header (8 bytes, little endian), the header, and the bytes of all tensors. The format is
 * described at https://github.com/huggingface/safetensors#format.
 *
 * Reading the header allocates nothing for the tensors, whose forms may be compared with what is expected first.
 */
internal class Safetensors private constructor(private val file: FileChannel, private val begin: Long, header: Fields) {
    val metadata: Map<String, String> = header.or(emptyMap(), METADATA, members(text))
    private val places: Map<String, Place> = (header.names - METADATA).associateWith { place(it, header.at(it, fields)) }

    /** Of every tensor its form; null: it has a type that no session has. */
    val forms: Map<String, TensorSpec?> get() = places.mapValues { it.value.form }

    /** Reads a tensor of a known type. */
    fun read(name: String): Tensor = places.getValue(name).let { place ->
        Tensor(place.form!!).also { readFully(file, it.bytes.duplicate(), begin + place.first) }
    }

    private fun place(name: String, part: Fields): Place {
        val offsets = part.at("data_offsets", items(long(0..Long.MAX_VALUE)))
        if (offsets.size != 2) part.refuse("data_offsets", offsets, "two of them")
        val (first, end) = offsets
        val shape = part.at("shape", items(whole(0..Int.MAX_VALUE)))
        val form = NAMES[part.at("dtype", text)]?.let { TensorSpec(name, it, shape) }
        val fits = first <= end && begin + end <= file.size() && (form == null || form.nbytes == end - first)
        if (!fits) part.refuse("data_offsets", listOf(first, end), "those of $shape within the file")
        return Place(form, first)
    }

    private class Place(val form: TensorSpec?, val first: Long)

    companion object {
        /** @throws JsonException the header is none, or does not fit the file. */
        fun open(file: FileChannel): Safetensors {
            val length = ByteBuffer.allocate(Long.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN).also { readFully(file, it, 0) }.getLong(0)
            if (length !in 2..Json.LARGEST) throw JsonException("a header of $length bytes")
            val header = ByteBuffer.allocate(length.toInt()).also { readFully(file, it, Long.SIZE_BYTES.toLong()) }
            return Safetensors(file, Long.SIZE_BYTES + length, Fields(Json.parse(Json.decode(header.array()))))
        }

        fun write(file: FileChannel, tensors: Map<String, Tensor>, metadata: Map<String, String>) {
            val labels = NAMES.entries.associate { (label, dtype) -> dtype to label }
            val members = linkedMapOf<String, Any>(METADATA to metadata)
            var at = 0L
            for ((name, tensor) in tensors) {
                val end = at + tensor.nbytes
                members[name] = linkedMapOf(
                    "dtype" to labels.getValue(tensor.spec.dtype),
                    "shape" to tensor.spec.shape,
                    "data_offsets" to listOf(at, end),
                )
                at = end
            }
            val json = Json.write(members).toByteArray()
            val header = json + ByteArray(-json.size and 7) { ' '.code.toByte() } // tensors begin at a multiple of 8
            val length = ByteBuffer.allocate(Long.SIZE_BYTES).order(ByteOrder.LITTLE_ENDIAN).putLong(0, header.size.toLong())
            (listOf(length, ByteBuffer.wrap(header)) + tensors.values.map { it.bytes.duplicate() }).forEach { part ->
                while (part.hasRemaining()) file.write(part)
            }
        }

        private fun readFully(file: FileChannel, to: ByteBuffer, from: Long) {
            var at = from
            while (to.hasRemaining()) {
                val count = file.read(to, at)
                if (count < 0) throw EOFException("it ends too early")
                at += count
            }
        }
    }
}
