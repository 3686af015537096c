package dev.rmseedge.demo.logic

import java.util.Locale

/** The summary of a `Bench` as a Markdown table, which is as readable where it is not rendered. */
fun timingTable(summary: Map<String, Any?>): String = buildString {
    appendLine("| test | loops | tokens/s |")
    appendLine("| --- | --- | --- |")
    for (row in summary["rows"] as List<*>) {
        val cells = row as Map<*, *>
        val loops = if (cells["mode"] == "fixed") "${cells["max_loops"]}" else "%.2f (early exit)".format(Locale.ROOT, cells["mean_loops"])
        appendLine("| ${cells["test"]} | $loops | ${spread(cells["tok_per_s"])} |")
    }
    for ((test, times) in summary["adaptive_speedup"] as Map<*, *>) {
        appendLine("$test: early exit is %.2f x as fast as full depth".format(Locale.ROOT, times))
    }
}

private fun spread(value: Any?): String {
    val found = value as Map<*, *>
    return "%.1f ± %.1f".format(Locale.ROOT, found["mean"], found["sd"])
}
