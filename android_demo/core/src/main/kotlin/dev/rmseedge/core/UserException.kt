package dev.rmseedge.core

/**
 * Something the user gave is wrong: the message is one sentence that names the thing and says what to do about it.
 *
 * Everything else that is thrown is a defect of the program.
 */
open class UserException(message: String, cause: Throwable? = null) : Exception(oneLine(message), cause)

/** A package or an archive is missing, damaged, edited, or made for something else. */
class PackageException(message: String, cause: Throwable? = null) : UserException(message, cause)

/** A setting has a value that the model cannot run with: "max_loops: got 9, expected 1..4". */
class ArgumentException(val name: String, problem: String) : UserException("$name: $problem")

/** A session file is missing, damaged, of another version, or of another model. */
class SessionException(message: String, cause: Throwable? = null) : UserException(message, cause)

/** A text cannot be expressed in the tokenizer's vocabulary, or is longer than the model takes. */
class TextException(message: String) : UserException(message)

/** Names that come from a file may hold anything: what would break a line or cannot be shown becomes a space. */
private fun oneLine(text: String): String = text.map { if (it.isISOControl()) ' ' else it }.joinToString("")
