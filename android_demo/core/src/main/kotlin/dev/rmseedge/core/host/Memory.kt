package dev.rmseedge.core.host

import dev.rmseedge.core.engine.Engine
import dev.rmseedge.core.engine.Method
import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.model.TensorSpec
import dev.rmseedge.core.pack.LoopPackage

/** The neural memory: what it holds before a text, and how it learns the segment that was just completed. */
internal class Memory(engine: Engine, private val pack: LoopPackage, private val kept: Kept) : AutoCloseable {
    private val rows = pack.info.segment!!
    private val memorize = engine.load(pack, "memorize", rows)
    private val learned: Map<String, Tensor>

    init {
        engine.load(pack, "blank", rows).use { blank ->
            val made = bind(blank)
            blank.run()
            kept.setBlank(made.filterKeys(pack.info.memory::containsKey))
        }
        learned = bind(memorize)
    }

    /** Teaches it the segment; returns how badly it predicted that before. */
    fun learn(): Float {
        memorize.run()
        for (name in pack.info.memory.keys) kept.all.getValue(name).copy(learned.getValue("next_$name"))
        return learned.getValue("surprise").floats[0]
    }

    override fun close() = memorize.close()

    /** Binds what a method takes and gives; returns the latter. */
    private fun bind(method: Method): Map<String, Tensor> {
        method.spec.inputs.forEachIndexed { i, input -> method.read(i, kept.all[input.name] ?: count(input)) }
        return method.spec.outputs.mapIndexed { i, output -> output.name to Tensor(output).also { method.write(i, it) } }.toMap()
    }

    /** n_valid: a segment is whole when it is learned. */
    private fun count(spec: TensorSpec) = Tensor(spec).apply { longs.put(0, rows.toLong()) }
}
