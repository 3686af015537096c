package dev.rmseedge.demo.work

import dev.rmseedge.core.measure.ProcessMemory
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.core.text.Conversation
import dev.rmseedge.core.text.TextSession
import dev.rmseedge.demo.logic.LoadSettings

/**
 * A package whose engine holds it in memory. It belongs to the thread that runs models, and is closed there.
 *
 * @property before memory of this process before it was loaded.
 */
class Loaded private constructor(val settings: LoadSettings, val pack: LoopPackage, val session: TextSession, val before: ProcessMemory?) :
    AutoCloseable by session {
    /** As the sliders have them. */
    @Volatile
    var dials: Dials = pack.info.dials

    /** Its turns, where it has a chat template; null: it has none that this app reads. */
    val conversation: Conversation? = pack.turns?.let { Conversation(session, it) }

    companion object {
        /** Loads a verified package. Blocks. */
        fun open(settings: LoadSettings, pack: LoopPackage): Loaded {
            val before = ProcessMemory.now()
            return Loaded(settings, pack, TextSession.open(pack, settings.threads, settings.expertMemory), before)
        }
    }
}
