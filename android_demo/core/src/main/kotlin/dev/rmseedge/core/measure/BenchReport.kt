package dev.rmseedge.core.measure

import dev.rmseedge.core.host.LoopRuntime

/**
 * A bench as `rmse-bench -o json` prints it, for `Json.write`, after [Bench.run].
 *
 * The memory bandwidth is left null: measuring it takes more memory than a phone has to spare.
 *
 * @param baseline resident memory before the model was loaded.
 * @param notes what a reader should know besides, such as the phone's name.
 */
fun benchReport(
    bench: Bench,
    runtime: LoopRuntime,
    baseline: ProcessMemory? = null,
    notes: List<String> = emptyList(),
): Map<String, Any?> {
    val info = runtime.info
    val memory = ProcessMemory.now()
    return linkedMapOf<String, Any?>(
        "model" to info.name,
        "runtime" to runtime.engine,
        "quant" to info.quant,
        "parameters" to info.parameters,
        "package_bytes" to info.nbytes,
        "state_bytes" to runtime.stateBytes,
        "peak_rss_bytes" to memory?.peak,
        "rss_bytes" to memory?.resident,
        "baseline_rss_bytes" to baseline?.resident,
        "threads" to runtime.threads,
        "memory_gb_per_s" to null,
        "memory_threads" to null,
        "dials" to bench.dials.toMap(),
    ) + bench.summary() + ("notes" to notes)
}
