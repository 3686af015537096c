package dev.rmseedge.demo.logic

import java.io.File
import java.util.Locale

/**
 * The cores of this device by how fast they can be.
 *
 * Phones have slow cores beside fast ones. A call of the engine ends when its slowest thread does, so a thread on a slow core
 * makes all others wait: only as many threads are worth having as there are fast cores.
 *
 * @property frequencies the highest frequency of every core, kHz; 0 where the system does not tell.
 */
class CpuCores(val frequencies: List<Long>) {
    /** Threads to begin with, from 1 to [MOST]. */
    val threads: Int get() = fast.coerceIn(1, MOST)

    /** Cores of all clusters but the slowest; where all are alike, half of them. */
    private val fast: Int
        get() {
            val slowest = frequencies.minOrNull() ?: return 1
            val faster = frequencies.count { it > slowest }
            return if (faster > 0) faster else frequencies.size / 2
        }

    /** The clusters from fast to slow: "1 x 3.0 GHz, 3 x 2.5 GHz, 4 x 1.8 GHz". */
    override fun toString(): String = frequencies
        .groupingBy { it }
        .eachCount()
        .toSortedMap(reverseOrder())
        .entries
        .joinToString { (kHz, count) -> if (kHz > 0) "$count x %.1f GHz".format(Locale.ROOT, kHz / 1e6) else "$count" }

    companion object {
        /** More threads wait for each other longer than they compute, at the sizes of models that phones run. */
        const val MOST = 4

        private val CORE = Regex("cpu\\d+")

        /** What Linux tells of them in [folder]; without it, as many alike as [count]. */
        fun read(folder: File = File("/sys/devices/system/cpu"), count: Int = Runtime.getRuntime().availableProcessors()): CpuCores {
            val cores = folder.listFiles { file -> CORE.matches(file.name) }.orEmpty()
            val known = cores.map { frequency(File(it, "cpufreq/cpuinfo_max_freq")) }
            return CpuCores(if (known.any { it > 0 }) known else List(count) { 0L })
        }

        private fun frequency(file: File): Long = runCatching { file.readText().trim().toLong() }.getOrDefault(0L)
    }
}
