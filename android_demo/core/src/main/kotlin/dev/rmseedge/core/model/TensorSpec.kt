package dev.rmseedge.core.model

/** The type of a tensor's elements; [label] as manifests have it. */
enum class Dtype(val label: String, val nbytes: Int) {
    FLOAT32("float32", 4),
    FLOAT16("float16", 2),
    BFLOAT16("bfloat16", 2),
    INT64("int64", 8),
    INT32("int32", 4),
    INT8("int8", 1),
    UINT8("uint8", 1),
    BOOL("bool", 1),
    ;

    companion object {
        val BY_LABEL: Map<String, Dtype> = entries.associateBy { it.label }
    }
}

/**
 * Name, type and shape of a tensor that a method takes or gives.
 *
 * @property slotsAxis the axis that is as long as the appended state has slots just then, where [shape] has the most there are;
 *   null: there is none.
 */
data class TensorSpec(val name: String, val dtype: Dtype, val shape: List<Int>, val slotsAxis: Int? = null) {
    val elements: Long get() = shape.fold(1L) { product, size -> product * size }
    val nbytes: Long get() = elements * dtype.nbytes

    /** The same where the appended state has so many slots; null: all of them. */
    fun ofSlots(slots: Int?): TensorSpec {
        if (slots == null || slotsAxis == null) return this
        return copy(shape = shape.mapIndexed { axis, size -> if (axis == slotsAxis) slots else size })
    }

    fun fits(other: TensorSpec): Boolean = dtype == other.dtype && shape == other.shape

    override fun toString(): String = "$name $shape ${dtype.label}"
}

/** What a method takes and gives, in the order of its arguments. */
data class MethodSpec(val inputs: List<TensorSpec>, val outputs: List<TensorSpec>)
