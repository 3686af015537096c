package dev.rmseedge.core.model

/** How the host updates a tensor after a call. */
enum class StateKind(val label: String) {
    /** The row of position p lies in slot p mod W of the last axis but one. */
    RING("ring"),

    /** The row of position p lies in slot p of it. */
    APPEND("append"),

    /** The source is the state. */
    REPLACE("replace"),

    /** A method that is called once per segment gives it anew. */
    WRITTEN("written"),
}

/**
 * A tensor that is kept between calls.
 *
 * @property source of written ones the method that gives them, of all others the tensor that they are updated with.
 * @property perLoop (K, ...): iteration k reads row k.
 */
data class State(val tensor: TensorSpec, val kind: StateKind, val source: String, val readBy: List<String>, val perLoop: Boolean) {
    val hasSlots: Boolean get() = kind == StateKind.RING || kind == StateKind.APPEND

    /** Positions that the last axis but one holds; of tensors that have slots. */
    val slots: Int get() = tensor.shape[tensor.shape.size - 2]

    /** The form of its source in calls of so many rows. */
    fun taken(rows: Int): TensorSpec {
        val shape = if (hasSlots) tensor.shape.dropLast(2) + rows + tensor.shape.last() else tensor.shape
        return TensorSpec(source, tensor.dtype, shape)
    }
}
