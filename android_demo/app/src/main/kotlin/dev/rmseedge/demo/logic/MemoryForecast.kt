package dev.rmseedge.demo.logic

import java.util.Locale

/**
 * What loading a package would take, beside what there is; all in bytes.
 *
 * @property needed by the package, as predicted from its manifest.
 * @property free as the system reports it.
 * @property reserve what the system keeps for itself: with less it begins to end apps.
 * @property engine what runs the package.
 * @property bounds whether its experts may be given less memory than they have.
 */
class MemoryForecast(val needed: Long, val free: Long, val reserve: Long, val engine: String = "", val bounds: Boolean = false) {
    /** Whether it can be loaded without the system ending this app or others. */
    val fits: Boolean get() = needed <= free - reserve
}

/** Bytes as people read them: "48 MB", "1.5 GB". */
fun bytesText(bytes: Long): String = when {
    bytes >= 1_000_000_000 -> "%.1f GB".format(Locale.ROOT, bytes / 1e9)
    bytes >= 1_000_000 -> "%.0f MB".format(Locale.ROOT, bytes / 1e6)
    else -> "%.0f kB".format(Locale.ROOT, bytes / 1e3)
}
