package dev.rmseedge.core.host

import dev.rmseedge.core.engine.Engine
import dev.rmseedge.core.engine.Method
import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.model.TensorSpec
import dev.rmseedge.core.model.givenTensors
import dev.rmseedge.core.pack.LoopPackage

/** Loads a method for calls of so many rows. */
internal fun Engine.load(pack: LoopPackage, method: String, rows: Int): Method =
    "${method}_$rows".let { load(it, pack.methods.getValue(it)) }

/**
 * The methods for calls of one number of rows, and the tensors that one gives to the next. That all of it fits together, the package
 * was checked for.
 *
 * @param shared tensors that calls of all numbers of rows read: dials, state, hits.
 * @param slots how many the appended state has just now; null: there is none.
 */
internal class Calls(
    private val engine: Engine,
    private val pack: LoopPackage,
    val rows: Int,
    private val shared: Map<String, Tensor>,
    private val slots: () -> Int?,
) : AutoCloseable {
    private val info: ModelInfo = pack.info
    private val host: Map<String, TensorSpec> = givenTensors(info, rows) - shared.keys
    private val given = mutableMapOf<String, Tensor>() // by the host, of what methods take
    private val made = mutableMapOf<String, Tensor>() // by methods
    private val growing = mutableListOf<() -> Unit>() // binds what grows with the text

    private val prelude = load("prelude")
    private val loop = load("loop")
    private val coda = if ("coda" in info.methods) load("coda") else null
    private val head = load("head")
    private val commit = if ("commit" in info.methods) load("commit") else null
    private val angles = Angles.of(info.text, given)

    /** What a method gave in the last call. */
    fun made(name: String): Tensor = made.getValue(name)

    /**
     * One call: prelude, loop, coda, [withHead] head, commit. It reads [count] tokens from index [from] on, the first of which stands at
     * [position].
     *
     * @return iterations that ran.
     */
    fun run(tokens: IntArray, from: Int, count: Int, position: Long, noiseSeed: ULong, prefix: Int, withHead: Boolean): Int {
        given["tokens"]?.longs?.let { ids -> for (row in 0 until rows) ids.put(row, if (row < count) tokens[from + row].toLong() else 0L) }
        given["position"]?.longs?.put(0, position)
        given["n_valid"]?.longs?.put(0, count.toLong())
        given["prefix"]?.longs?.put(0, prefix.toLong())
        angles.forEach { it.fill(position, rows) }
        fillNoise(position, noiseSeed)
        prelude.run()
        loop.run()
        coda?.run()
        if (withHead) head.run()
        commit?.run()
        return made("iterations").longs[0].toInt()
    }

    /** The loop once more, as the last call left what it reads: for timing it alone. */
    fun repeatLoop() = loop.run()

    /** The appended state has another number of slots now. */
    fun bindGrown() {
        given.remove("slots")
        growing.forEach { it() }
    }

    override fun close() = listOfNotNull(prelude, loop, coda, head, commit).forEach(Method::close)

    /** Loads a method and binds what it takes and gives; those that come before it were loaded before. */
    private fun load(called: String): Method {
        val method = engine.load(pack, called, rows)
        method.spec.inputs.forEachIndexed { i, input ->
            method.read(i, given(input))
            if (input.slotsAxis != null) growing += { method.read(i, given(input)) }
        }
        method.spec.outputs.forEachIndexed { i, output ->
            val tensor = Tensor(output)
            made[output.name] = tensor
            method.write(i, tensor)
        }
        return method
    }

    private fun given(input: TensorSpec): Tensor {
        shared[input.name]?.let { return it }
        val spec = host[input.name] ?: return made(input.name)
        return given.getOrPut(spec.name) { if (spec.name == "slots") slots(spec) else Tensor(spec) }
    }

    private fun slots(spec: TensorSpec): Tensor = Tensor(spec.ofSlots(slots())).apply {
        for (slot in 0 until this.spec.shape[0]) longs.put(slot, slot.toLong())
    }

    /** Row r of what the model begins from belongs to its position, however the text is cut into calls. */
    private fun fillNoise(position: Long, seed: ULong) {
        info.noise.toSortedMap().entries.forEachIndexed { i, (name, deviation) ->
            val to = given[name]?.floats ?: return@forEachIndexed
            val own = if (i == 0) seed else SplitMix64.number(seed, i.toULong())
            for (row in 0 until rows) {
                noise(own, (position + row).toULong(), info.width).forEachIndexed { channel, z ->
                    to.put(row * info.width + channel, z * deviation.toFloat())
                }
            }
        }
    }
}
