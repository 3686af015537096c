package dev.rmseedge.core.json

/** How one kind of value is read: the value, or a [JsonException] that names its path. */
fun interface Reader<T> {
    fun read(value: Any?, path: String): T
}

/**
 * An object whose members are read by their types: `fields.at("width", whole(1..65536))`.
 *
 * A member that is missing or does not fit is a [JsonException]: "model.width: got "wide", expected a whole number". A member that
 * is null counts as missing. Names that nobody asks for are left alone: another version may have written them.
 */
class Fields(value: Any?, private val path: String = "") {
    private val members: Map<*, *> = value as? Map<*, *> ?: unfit(value, path.ifEmpty { "it" }, "an object")

    val names: Set<String> get() = members.keys.mapTo(linkedSetOf()) { it as String }

    operator fun contains(name: String): Boolean = members[name] != null

    fun <T> at(name: String, reader: Reader<T>): T {
        val value = members[name] ?: throw JsonException("${pathOf(name)}: is missing")
        return reader.read(value, pathOf(name))
    }

    fun <T> orNull(name: String, reader: Reader<T>): T? = if (name in this) at(name, reader) else null

    fun <T> or(default: T, name: String, reader: Reader<T>): T = if (name in this) at(name, reader) else default

    /** Fails over a member that fits its type but not its neighbours. */
    fun refuse(name: String, got: Any?, expected: String): Nothing = refuseField(pathOf(name), got, expected)

    private fun pathOf(name: String) = if (path.isEmpty()) name else "$path.$name"
}

/** Fails over the value of a field, by its whole path. */
fun refuseField(field: String, got: Any?, expected: String): Nothing =
    throw JsonException("$field: got ${(got as? String ?: quoted(got)).take(300)}, expected $expected")

private fun unfit(value: Any?, path: String, expected: String): Nothing =
    throw JsonException("$path: got ${quoted(value)}, expected $expected")

val fields = Reader { value, path -> Fields(value, path) }

val text = Reader { value, path -> value as? String ?: unfit(value, path, "text") }

val name = Reader { value, path ->
    (value as? String)?.takeIf { it.length in 1..200 } ?: unfit(value, path, "text of 1 to 200 characters")
}

val flag = Reader { value, path -> value as? Boolean ?: unfit(value, path, "true or false") }

val number = Reader { value, path -> (value as? Number)?.toDouble() ?: unfit(value, path, "a number") }

val positive = Reader { value, path -> number.read(value, path).takeIf { it > 0 } ?: unfit(value, path, "a positive number") }

fun long(range: LongRange) = Reader { value, path ->
    (value as? Long)?.takeIf { it in range } ?: unfit(value, path, "a whole number from ${range.first} to ${range.last}")
}

fun whole(range: IntRange) = Reader { value, path -> long(range.first.toLong()..range.last).read(value, path).toInt() }

fun <T> items(reader: Reader<T>) = Reader { value, path ->
    (value as? List<*> ?: unfit(value, path, "a list")).mapIndexed { i, item -> reader.read(item, "$path[$i]") }
}

/** An object of values that are all of one kind, in its order. */
fun <T> members(reader: Reader<T>) = Reader { value, path ->
    Fields(value, path).let { all -> all.names.associateWith { all.at(it, reader) } }
}

fun <T> oneOf(known: Map<String, T>) = Reader { value, path ->
    known[value] ?: unfit(value, path, "one of ${known.keys.joinToString()}")
}
