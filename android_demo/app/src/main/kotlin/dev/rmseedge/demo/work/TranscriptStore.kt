package dev.rmseedge.demo.work

import dev.rmseedge.core.json.JsonException
import dev.rmseedge.demo.logic.Transcript
import dev.rmseedge.demo.logic.dropOldStates
import java.io.File
import java.io.IOException
import java.nio.file.Files
import java.nio.file.StandardCopyOption.ATOMIC_MOVE
import java.nio.file.StandardCopyOption.REPLACE_EXISTING

/** A kept text. [id] orders them: it is the time when the text began, in milliseconds. */
class Kept(val id: Long, val transcript: Transcript)

/** The texts that were written, each with the model's state at its end, so that it can go on after the process has ended. */
class TranscriptStore(private val folder: File) {
    init {
        folder.mkdirs()
    }

    /** All of them, the newest first; what cannot be read is left out. */
    fun all(): List<Kept> = folder
        .list()
        .orEmpty()
        .mapNotNull { it.removeSuffix(TEXT).takeIf { name -> name != it }?.toLongOrNull() }
        .sortedDescending()
        .mapNotNull(::find)

    fun find(id: Long): Kept? = try {
        Kept(id, Transcript.ofJson(text(id).readText()))
    } catch (_: IOException) {
        null
    } catch (_: JsonException) {
        null
    }

    /** Writes a text, all or nothing. */
    @Throws(IOException::class)
    fun keep(kept: Kept) {
        val part = File(folder, "${kept.id}.part")
        part.writeText(kept.transcript.toJson())
        Files.move(part.toPath(), text(kept.id).toPath(), ATOMIC_MOVE, REPLACE_EXISTING)
    }

    /** Where the model's state at the end of a text is kept. */
    fun session(id: Long): File = File(folder, "$id$STATE")

    /** Removes old states until there is room; never that of text [id]. Returns how many. */
    fun limitStates(id: Long): Int {
        val states = folder.listFiles { file -> file.name.endsWith(STATE) }.orEmpty().toList()
        return dropOldStates(states, session(id), MOST_STATE)
    }

    fun remove(id: Long) {
        text(id).delete()
        session(id).delete()
    }

    private fun text(id: Long) = File(folder, "$id$TEXT")

    companion object {
        /** Bytes that the states of all texts may take. */
        const val MOST_STATE = 256_000_000L
        private const val TEXT = ".json"
        private const val STATE = ".session"
    }
}
