package dev.rmseedge.core.measure

import kotlin.math.sqrt

/** Mean, standard deviation (of a sample; 0 of one value) and median of measurements. */
data class Summary(val mean: Double, val sd: Double, val median: Double) {
    /** Under the names of `rmse-bench -o json`. */
    fun toMap(): Map<String, Double> = linkedMapOf("mean" to mean, "sd" to sd, "median" to median)

    companion object {
        fun of(values: DoubleArray): Summary {
            require(values.isNotEmpty()) { "no values to sum up" }
            val mean = values.average()
            val spread = if (values.size < 2) 0.0 else sqrt(values.sumOf { (it - mean) * (it - mean) } / (values.size - 1))
            val sorted = values.sortedArray()
            val middle = sorted.size / 2
            val median = if (sorted.size % 2 == 1) sorted[middle] else (sorted[middle - 1] + sorted[middle]) / 2
            return Summary(mean, spread, median)
        }
    }
}
