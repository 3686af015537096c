package dev.rmseedge.demo.work

import dev.rmseedge.core.engine.Engine
import dev.rmseedge.core.engine.OnnxEngine
import dev.rmseedge.core.measure.ProcessMemory
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.core.text.TextSession
import dev.rmseedge.demo.logic.LoadSettings

/**
 * A package whose engine holds it in memory. It belongs to the thread that runs models, and is closed there.
 *
 * @property before memory of this process before it was loaded.
 */
class Loaded private constructor(val settings: LoadSettings, val pack: LoopPackage, val engine: Engine, val before: ProcessMemory?) :
    AutoCloseable {
    val session = TextSession(pack, engine)

    /** As the sliders have them. */
    @Volatile
    var dials: Dials = pack.info.dials

    override fun close() {
        session.close()
        engine.close()
    }

    companion object {
        /** Loads a verified package. Blocks. */
        fun open(settings: LoadSettings, pack: LoopPackage): Loaded {
            val before = ProcessMemory.now()
            val engine = OnnxEngine(pack, settings.threads)
            return try {
                Loaded(settings, pack, engine, before)
            } catch (error: Throwable) { // an engine holds memory that no collector frees
                engine.close()
                throw error
            }
        }
    }
}
