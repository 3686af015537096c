package dev.rmseedge.demo.logic

import java.io.File

/**
 * Removes states of texts until all of them have [most] bytes at most: those first that were written longest ago, and never [current], the
 * one that was written just now.
 *
 * @return how many were removed. Their texts stay: a model reads them anew, or begins another.
 */
fun dropOldStates(states: List<File>, current: File, most: Long): Int {
    var bytes = states.sumOf(File::length)
    val oldest = states.filter { it != current }.sortedWith(compareBy(File::lastModified, File::getName))
    var removed = 0
    for (state in oldest) {
        if (bytes <= most) break
        val size = state.length()
        if (!state.delete()) continue
        bytes -= size
        removed++
    }
    return removed
}
