package dev.rmseedge.demo.logic

import dev.rmseedge.core.UserException
import dev.rmseedge.core.measure.ProcessMemory
import dev.rmseedge.core.text.GenerationControl
import dev.rmseedge.core.text.GenerationSettings
import dev.rmseedge.core.text.Sampling
import dev.rmseedge.core.text.TextSession
import java.io.File
import java.util.Locale
import kotlin.math.abs

/**
 * What a device must do as well as the machine that the app was built on. docs/android-checklist.md says what each check means.
 *
 * @property scratch a folder for a session.
 */
class Checklist(private val session: TextSession, private val scratch: File) {
    /** The package gives what it gave where the app was built. */
    fun text(reference: Reference?): Check = check("text") {
        val info = session.info
        if (reference == null) return@check Verdict.SKIPPED to "the app was built without a reference"
        if (reference.fingerprint != info.fingerprint || reference.quant != info.quant) {
            return@check Verdict.SKIPPED to "the reference is of another package"
        }
        val found = reference.compare(session.runtime)
        val drift = abs(found.meanDepth / found.expectedMeanDepth - 1)
        val same = "%.1f %% same top token, %.1f %% same depth".format(Locale.ROOT, 100 * found.top, 100 * found.depth)
        val mean = "mean depth %.2f for %.2f".format(Locale.ROOT, found.meanDepth, found.expectedMeanDepth)
        verdict(found.top >= SAME_TOP && found.depth >= SAME_DEPTH && drift <= DRIFT) to "$same, $mean"
    }

    /** A text goes on from a saved session as it goes on without. */
    fun sessions(beginning: String): Check = check("sessions") {
        val file = File(scratch, "check.session")
        try {
            session.reset()
            write(beginning)
            session.save(file)
            val straight = write("")
            session.reset()
            session.restore(file)
            val resumed = write("")
            verdict(straight == resumed) to "$TOKENS tokens, again behind a restored session"
        } finally {
            file.delete()
        }
    }

    /** Stopping early saves time. [summary] is of `Bench`. */
    fun speed(summary: Map<String, Any?>): Check = check("stopping early") {
        val speedups = (summary["adaptive_speedup"] as Map<*, *>).mapValues { (_, times) -> times as Double }
        val skipped = summary["work_skipped"] as Double?
        if (skipped == null || speedups.isEmpty()) return@check Verdict.SKIPPED to "the package's own settings never stop early"
        val times = speedups.entries.joinToString { (test, times) -> "$test %.2f x as fast".format(Locale.ROOT, times) }
        val said = "%.0f %% of the loops are skipped, $times".format(Locale.ROOT, 100 * skipped)
        if (skipped < WORTH) return@check Verdict.SKIPPED to said
        verdict(speedups.filterKeys { "$it".startsWith("tg") }.values.all { it > 1 }) to said
    }

    /** What it takes is what was predicted, or less. */
    fun memory(predicted: Long, before: ProcessMemory?, now: ProcessMemory?): Check = check("memory") {
        if (before == null || now == null) return@check Verdict.SKIPPED to "the system does not tell"
        val taken = now.resident - before.resident
        verdict(taken <= predicted) to "${bytesText(taken)} more than before it was loaded, ${bytesText(predicted)} predicted"
    }

    private fun write(prompt: String): List<Int> {
        val settings = GenerationSettings(TOKENS, Sampling(seed = 1u), ignoreEos = true)
        return session.generate(prompt, settings, GenerationControl(session.info.dials)) {}.tokens.toList()
    }

    private fun check(name: String, run: () -> Pair<Verdict, String>): Check = try {
        run().let { (verdict, detail) -> Check(name, verdict, detail) }
    } catch (error: UserException) {
        Check(name, Verdict.FAILED, error.message.orEmpty())
    }

    private fun verdict(fits: Boolean) = if (fits) Verdict.OK else Verdict.FAILED

    private companion object {
        // Integers that round activations differ a little from processor to processor: the rule of the parity gate for them.
        const val SAME_TOP = 0.98
        const val SAME_DEPTH = 0.97
        const val DRIFT = 0.02
        const val WORTH = 0.3 // share of loops that must be skipped for a gain to be expected
        const val TOKENS = 40
    }
}
