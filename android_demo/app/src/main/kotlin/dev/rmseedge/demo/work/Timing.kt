package dev.rmseedge.demo.work

import android.content.Context
import android.os.Build
import android.system.Os
import android.system.OsConstants
import dev.rmseedge.core.UserException
import dev.rmseedge.core.json.Json
import dev.rmseedge.core.measure.Bench
import dev.rmseedge.core.measure.BenchSettings
import dev.rmseedge.core.measure.ProcessMemory
import dev.rmseedge.core.measure.benchReport
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.Checklist
import dev.rmseedge.demo.logic.CpuCores
import dev.rmseedge.demo.logic.Reference
import dev.rmseedge.demo.logic.bytesText
import dev.rmseedge.demo.logic.report
import dev.rmseedge.demo.logic.timingTable
import java.io.FileNotFoundException

/** What to time: tokens of a prompt, tokens to write, and how often. */
class TimingSettings(val prompt: Int, val generate: Int, val repetitions: Int)

/**
 * What a bench or a report found.
 *
 * @property text for people.
 * @property document what is shared, of the media type [type].
 */
class TimingResult(val text: String, val document: String, val type: String)

/** Times the model, and compares it with where the app was built. Called on the thread of models. */
class Timing(private val context: Context, private val work: Live<Work>) {
    /** What was found last. */
    val result = Live<TimingResult?>(null)

    @Volatile
    private var stopped = false

    fun stop() {
        stopped = true
    }

    /** The protocol of `rmse-bench`; nothing is shown of one that was stopped. */
    fun time(model: Loaded, settings: TimingSettings) {
        val bench = bench(model, BenchSettings(settings.prompt, settings.generate, repetitions = settings.repetitions)) ?: return
        val notes = listOf("${Build.MANUFACTURER} ${Build.MODEL}, Android ${Build.VERSION.RELEASE}")
        val document = benchReport(bench, model.session.runtime, model.before, notes)
        result.value = TimingResult(timingTable(bench.summary()), Json.write(document), "application/json")
    }

    /** All checks, as Markdown. */
    fun report(model: Loaded, cores: CpuCores) {
        val sample = model.pack.sample ?: throw UserException(context.getString(R.string.no_sample))
        val checklist = Checklist(model.session, context.cacheDir)
        val first = listOf(checklist.text(reference()), checklist.sessions(sample.take(BEGINNING)))
        val summary = bench(model, BenchSettings(REPORT_PROMPT, REPORT_GENERATE))?.summary() ?: return
        val checks = first + checklist.speed(summary) + checklist.memory(model.pack.predictedBytes(), model.before, ProcessMemory.now())
        val markdown = report(facts(model, cores), checks) + "\n" + timingTable(summary)
        result.value = TimingResult(markdown, markdown, "text/plain")
    }

    private fun bench(model: Loaded, settings: BenchSettings): Bench? {
        stopped = false
        val info = model.pack.info
        val sample = model.pack.sample ?: throw UserException(context.getString(R.string.no_sample))
        val fitting = settings.copy(adaptive = info.dials.takeIf { it.exits }).fitting(info.longest)
        val bench = Bench(model.session.runtime, model.session.tokenizer.encode(sample), fitting)
        return bench.takeIf { it.run({ stopped }) { done, rows -> work.value = Work.Timing(done, rows) } }
    }

    private fun reference(): Reference? = try {
        Reference.ofJson(context.assets.open(REFERENCE).use { it.readBytes().decodeToString() })
    } catch (_: FileNotFoundException) {
        null
    }

    private fun facts(model: Loaded, cores: CpuCores): Map<String, String> = linkedMapOf(
        "device" to "${Build.MANUFACTURER} ${Build.MODEL} (${Build.HARDWARE})",
        "system" to "Android ${Build.VERSION.RELEASE}, API ${Build.VERSION.SDK_INT}",
        "ABIs" to Build.SUPPORTED_ABIS.joinToString(),
        "page size" to "${Os.sysconf(OsConstants._SC_PAGESIZE)} bytes",
        "cores" to "$cores",
        "package" to "${model.pack.info.name}, ${model.pack.info.quant}, ${bytesText(model.pack.nbytes)}",
        "engine" to model.session.runtime.engine,
        "threads" to "${model.settings.threads}",
    )

    private companion object {
        const val REFERENCE = "reference.json"
        const val BEGINNING = 20 // characters of a prompt
        const val REPORT_PROMPT = 128
        const val REPORT_GENERATE = 64
    }
}
