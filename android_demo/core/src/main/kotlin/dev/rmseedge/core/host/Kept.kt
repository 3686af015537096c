package dev.rmseedge.core.host

import dev.rmseedge.core.engine.Tensor
import dev.rmseedge.core.model.ModelInfo
import dev.rmseedge.core.model.StateKind
import dev.rmseedge.core.model.TensorSpec
import dev.rmseedge.core.model.givenTensors

/** All that is kept between calls: the state, and what the host itself keeps besides, the memory's segment and hits. */
internal fun keptTensors(info: ModelInfo): Map<String, TensorSpec> {
    val given = givenTensors(info, info.chunks.first())
    val others = listOf("segment", "retrieved", "retrieved_scores", "retrieved_valid").filter(given::containsKey)
    return info.state.mapValues { it.value.tensor } + others.associateWith(given::getValue)
}

/** The form of a kept tensor as sessions store it: of what is appended only the slots that are filled. */
internal fun TensorSpec.filled(info: ModelInfo, position: Long): TensorSpec {
    if (info.state[name]?.kind != StateKind.APPEND) return this
    val axis = shape.size - 2
    return copy(shape = shape.mapIndexed { i, size -> if (i == axis) Math.toIntExact(position) else size })
}

/** What is kept between calls: rings, appended rows and states, the memory and the segment that it has not learned yet, hits. */
internal class Kept(private val info: ModelInfo) {
    /** Slots that the appended state has just now; null: there is none. */
    var slots: Int? = info.slots(0)
        private set
    private val tensors = linkedMapOf<String, Tensor>()
    private var blank: Map<String, Tensor> = emptyMap() // what the memory holds before a text begins

    /** Exit states since the last boundary, which the memory is going to be taught; null: there is no memory. */
    val segment: Tensor? get() = tensors["segment"]

    /** All of it by name, as methods read it. */
    val all: Map<String, Tensor> get() = tensors

    /** Bytes of all of it. */
    val nbytes: Long get() = tensors.values.sumOf { it.nbytes.toLong() }

    init {
        for ((name, spec) in keptTensors(info)) tensors[name] = Tensor(spec.ofSlots(slots))
    }

    /** Takes what the memory holds before a text begins, by the names of its tensors. */
    fun setBlank(made: Map<String, Tensor>) {
        blank = made
    }

    /** Back to before a text; what slots hold is masked by position, zeroed all the same, to be reproducible. */
    fun reset() {
        grow(0)
        for ((name, tensor) in tensors) blank[name]?.let(tensor::copy) ?: tensor.clear()
    }

    /** Gives the appended state the slots of a text of so many positions; whether that are others than before. */
    fun grow(positions: Long): Boolean {
        val wanted = info.slots(positions)
        if (wanted == slots) return false
        slots = wanted
        for ((name, state) in info.state) {
            if (state.kind != StateKind.APPEND) continue
            val old = tensors.getValue(name)
            tensors[name] = Tensor(state.tensor.ofSlots(wanted)).also { copySlots(it, old, minOf(slotsOf(it), slotsOf(old))) }
        }
        return true
    }

    /** Takes what a call gave for its first [count] rows, the first of which stands at [position], as each tensor's kind says. */
    fun update(position: Long, count: Int, made: (String) -> Tensor) {
        for ((name, state) in info.state) {
            val tensor = tensors.getValue(name)
            when (state.kind) {
                StateKind.RING, StateKind.APPEND -> putRows(tensor, made(state.source), position, count)
                StateKind.REPLACE -> tensor.copy(made(state.source))
                StateKind.WRITTEN -> Unit
            }
        }
        segment?.let { segment ->
            val row = info.width * Float.SIZE_BYTES
            segment.copy((position % info.segment!!).toInt() * row, made("h"), 0, count * row)
        }
    }

    /** Everything at [position] as sessions store it: of what is appended only the slots that are filled. */
    fun filled(position: Long): Map<String, Tensor> = tensors.mapValues { (name, tensor) ->
        val filled = tensor.spec.filled(info, position)
        if (filled == tensor.spec) tensor else Tensor(filled).also { copySlots(it, tensor, slotsOf(it)) }
    }

    /** Puts back what [filled] gave; forms were compared before, and the appended state has grown. */
    fun restore(stored: Map<String, Tensor>) {
        for ((name, tensor) in tensors) {
            val from = stored.getValue(name)
            if (from.spec.shape == tensor.spec.shape) tensor.copy(from) else copySlots(tensor, from, slotsOf(from))
        }
    }

    /** Puts the row of every position into its slot; what is older than the slots last is gone. */
    private fun putRows(tensor: Tensor, made: Tensor, position: Long, count: Int) {
        val size = slotsOf(tensor)
        val rows = slotsOf(made)
        val entry = entryOf(tensor)
        for (outer in 0 until tensor.outer) {
            for (row in maxOf(0, count - size) until count) {
                val slot = ((position + row) % size).toInt()
                tensor.copy((outer * size + slot) * entry, made, (outer * rows + row) * entry, entry)
            }
        }
    }

    private fun copySlots(to: Tensor, from: Tensor, count: Int) {
        val entry = entryOf(to)
        for (outer in 0 until to.outer) {
            to.copy(outer * slotsOf(to) * entry, from, outer * slotsOf(from) * entry, count * entry)
        }
    }

    private fun slotsOf(tensor: Tensor): Int = tensor.spec.shape[tensor.spec.shape.size - 2]

    private fun entryOf(tensor: Tensor): Int = tensor.spec.shape.last() * tensor.spec.dtype.nbytes
}
