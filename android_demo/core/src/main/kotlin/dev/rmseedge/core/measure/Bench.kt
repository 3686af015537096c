package dev.rmseedge.core.measure

import dev.rmseedge.core.TextException
import dev.rmseedge.core.host.LoopRuntime
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.model.ModelInfo

/**
 * What to time.
 *
 * @property prompt tokens of the pp rows; 0: none.
 * @property generate tokens of the tg rows; 0: none.
 * @property depths fixed depths; none: full, a half and a third of it.
 * @property adaptive dials of the adaptive rows; null: there are none.
 * @property repetitions after one warm-up of every row.
 * @property context tokens in front of those of the tg rows.
 */
data class BenchSettings(
    val prompt: Int = 512,
    val generate: Int = 128,
    val depths: List<Int> = emptyList(),
    val adaptive: Dials? = null,
    val repetitions: Int = 5,
    val context: Int = 64,
) {
    /** The same for models that take texts of [room] tokens; null: of any number. */
    fun fitting(room: Long?): BenchSettings {
        if (room == null) return this
        val most = minOf(room, Int.MAX_VALUE.toLong()).toInt()
        val kept = minOf(generate, maxOf(1, most - minOf(context, most / 2)))
        return copy(prompt = minOf(prompt, most), generate = kept, context = minOf(context, most - kept))
    }

    /** Tokens that the longest row reads. */
    fun tokensNeeded(info: ModelInfo): Int = maxOf(prompt, if (generate > 0) context + generate else 0, info.chunks.last())
}

/**
 * Times one runtime on one text, at fixed depths and with its own exits, all rows interleaved: what the machine does besides meets all
 * alike.
 *
 * `pp` is prefill, `tg` decoding token by token with the text's own tokens, so that every repetition does the same work, and `loopN` the
 * loop alone for N rows. Protocol and names are those of `rmse-bench`.
 *
 * @throws TextException the text is shorter than the longest row.
 */
class Bench(private val runtime: LoopRuntime, private val ids: IntArray, private val settings: BenchSettings) {
    private val info = runtime.info
    private val full = info.maxLoops
    private val third = maxOf(1, full / 3)
    private val depths = settings.depths.ifEmpty { listOf(full, maxOf(1, full / 2), third) }.distinct()

    /** Of the adaptive rows; the model's own without them. */
    val dials: Dials get() = settings.adaptive ?: info.dials

    private val rows: List<BenchRow>
    private val loopRows: List<BenchRow>

    /** How often [run] reports progress. */
    val passes: Int get() = (settings.repetitions + 1) * (rows.size + loopRows.size)

    init {
        val needed = settings.tokensNeeded(info)
        if (ids.size < needed) {
            throw TextException("the text has ${ids.size} tokens, this bench needs $needed; choose shorter rows or a longer text")
        }
        val modes = depths.map { "fixed" to info.check(Dials(it)) } + listOfNotNull(settings.adaptive?.let { "adaptive" to info.check(it) })
        fun rowsOf(kind: String, count: Int, work: (BenchRow) -> Double) =
            if (count == 0) emptyList() else modes.map { (mode, dials) -> BenchRow("$kind$count", mode, dials, work) }
        rows = rowsOf("pp", settings.prompt, ::prefill) + rowsOf("tg", settings.generate, ::decode)
        // Full depth and a third are always among them: their ratio says what stopping early saves.
        val loopDepths = (depths + full + third).distinct().sortedDescending()
        loopRows =
            info.chunks.flatMap { chunk -> loopDepths.map { BenchRow("loop$chunk", "fixed", Dials(it)) { row -> loop(chunk, row) } } }
    }

    /**
     * One warm-up and then the repetitions, round robin over all rows.
     *
     * @param stopped is asked before every row; true ends the run.
     * @return whether all of it ran.
     */
    fun run(stopped: () -> Boolean = { false }, progress: (done: Int, total: Int) -> Unit = { _, _ -> }): Boolean {
        var done = 0
        for (repetition in 0..settings.repetitions) {
            for (row in rows + loopRows) {
                if (stopped()) return false
                val speed = row.work(row)
                if (repetition > 0) row.speeds += speed
                progress(++done, passes)
            }
        }
        runtime.reset()
        return true
    }

    /** All results under the names of `rmse-bench -o json`, for `Json.write`; after [run] has ended. */
    fun summary(): Map<String, Any?> {
        val adaptive = rows.filter { it.mode == "adaptive" }.maxByOrNull { it.depth.size }
        val histogram = adaptive?.let { row -> (1..full).map { k -> row.depth.count { it == k } } }
        return linkedMapOf(
            "repetitions" to settings.repetitions,
            "rows" to rows.map { it.summary() + ("gb_per_s" to if (it.test.startsWith("tg")) bytesPerSecond(it) / 1e9 else null) },
            "loop_rows" to loopRows.map { it.summary() },
            "loop_time_ratio" to linkedMapOf<String, Any>("max_loops" to third, "of" to full) +
                loopRows.map { it.test }.distinct().associateWith { test -> median(loopRows, test, third) / median(loopRows, test, full) },
            "adaptive_speedup" to rows.filter { it.mode == "adaptive" && full in depths }
                .associate { it.test to it.speed.median / median(rows, it.test, full) },
            "histogram" to histogram,
            "work_skipped" to adaptive?.let { 1 - it.depth.average() / full },
        )
    }

    private fun median(among: List<BenchRow>, test: String, depth: Int): Double =
        among.first { it.test == test && it.mode == "fixed" && it.dials.maxLoops == depth }.speed.median

    /** Of weights that decoding multiplies with, an estimate: those of the loop count once per loop, all others once. */
    private fun bytesPerSecond(row: BenchRow): Double =
        WEIGHT_BYTES.getOrDefault(info.quant, 4.0) * (row.depth.average() * info.loopWeights + info.onceWeights) * row.speed.median

    /** Tokens per second of one prompt. */
    private fun prefill(row: BenchRow): Double {
        runtime.reset()
        val start = System.nanoTime()
        val fed = runtime.feed(ids.copyOf(settings.prompt), row.dials)
        val seconds = secondsSince(start)
        row.depth = fed.depth
        row.iterations = fed.iterations
        return settings.prompt / seconds
    }

    /** Tokens per second behind the context, a prompt that is not timed. */
    private fun decode(row: BenchRow): Double {
        runtime.reset()
        if (settings.context > 0) runtime.feed(ids.copyOf(settings.context), row.dials)
        val tokens = ids.copyOfRange(settings.context, settings.context + settings.generate)
        val start = System.nanoTime()
        val fed = tokens.map { runtime.feed(intArrayOf(it), row.dials) }
        val seconds = secondsSince(start)
        row.depth = fed.map { it.depth[0] }.toIntArray()
        row.iterations = fed.map { it.iterations[0] }.toIntArray()
        return tokens.size / seconds
    }

    /** Milliseconds of the loop alone, averaged over as many as the clock needs. */
    private fun loop(chunk: Int, row: BenchRow): Double {
        runtime.reset()
        var calls = -1 // the first question comes before anything was timed
        var start = 0L
        runtime.timeLoop(ids, chunk, row.dials) {
            if (++calls == 0) start = System.nanoTime()
            calls == 0 || secondsSince(start) < LOOP_SECONDS
        }
        return 1000 * secondsSince(start) / calls
    }

    private fun secondsSince(start: Long) = (System.nanoTime() - start) / 1e9

    private companion object {
        const val LOOP_SECONDS = 0.02 // of one repetition of a loop row at least: single calls are too short for the clock

        /** Of a weight in memory, by how it is stored: fp16 is widened when loaded, scales count as part of int4. */
        val WEIGHT_BYTES = mapOf("fp32" to 4.0, "fp16" to 4.0, "int8" to 1.0, "int4" to 0.625)
    }
}

/** One line of the table: what is timed, by [work], and the speed of each repetition (tokens/s, or ms for the loop rows). */
internal class BenchRow(val test: String, val mode: String, val dials: Dials, val work: (BenchRow) -> Double) {
    val speeds = mutableListOf<Double>()
    var depth = IntArray(0) // of the timed positions
    var iterations = IntArray(0) // of the timed calls
    val speed: Summary get() = Summary.of(speeds.toDoubleArray())

    fun summary(): Map<String, Any?> {
        val known = linkedMapOf<String, Any?>("test" to test, "mode" to mode, "max_loops" to dials.maxLoops)
        if (depth.isEmpty()) return known + ("ms" to speed.toMap())
        return known + mapOf("mean_loops" to depth.average(), "mean_iterations" to iterations.average(), "tok_per_s" to speed.toMap())
    }
}
