package dev.rmseedge.demo.logic

/**
 * How a package is loaded.
 *
 * @property expertMemory what its experts may take, as `openRuntime` has it; null: no bound.
 */
data class LoadSettings(val model: String, val threads: Int, val expertMemory: String? = null)

/** A few words that outlive the process, as `SharedPreferences` keeps them; [commit] returns once they are on the disk. */
interface Notes {
    operator fun get(name: String): String?

    /** Writes all of [changes] at once; null removes. */
    fun commit(changes: Map<String, String?>)
}

/**
 * Remembers what was being loaded when the app ended, and what worked.
 *
 * An engine that runs out of memory takes the process with it, so an app that loads its last model at start would never start
 * again. What is tried is noted before; if the note is still there at the next start, that load did not end well.
 */
class LoadGuard(private val notes: Notes) {
    /** What was being loaded when the app ended; null: nothing was. */
    val broken: LoadSettings? get() = settings(TRIED)

    /** What was loaded last and worked; null: nothing yet. */
    val worked: LoadSettings? get() = settings(WORKED)

    /** What to load at start: what worked, unless it is what broke. */
    val atStart: LoadSettings? get() = worked.takeIf { it != broken }

    fun before(settings: LoadSettings) = notes.commit(mapOf(TRIED to text(settings)))

    fun succeeded(settings: LoadSettings) = notes.commit(mapOf(TRIED to null, WORKED to text(settings)))

    /** It failed with a message: nothing has ended. */
    fun failed() = notes.commit(mapOf(TRIED to null))

    private fun settings(name: String): LoadSettings? {
        val (threads, experts, model) = notes[name]?.split(' ', limit = 3)?.takeIf { it.size == 3 } ?: return null
        return threads.toIntOrNull()?.let { LoadSettings(model, it, experts.takeIf { said -> said != UNBOUNDED }) }
    }

    private fun text(settings: LoadSettings) = "${settings.threads} ${settings.expertMemory ?: UNBOUNDED} ${settings.model}"

    private companion object {
        const val TRIED = "load.tried"
        const val WORKED = "load.worked"
        const val UNBOUNDED = "-"
    }
}
