package dev.rmseedge.demo.work

/** What the app is doing. */
sealed interface Work {
    /** Nothing: everything may be asked for. */
    data object Idle : Work

    /** Something that is waited for, as a sentence says; [share] of it is done, null where that is not known. */
    data class Preparing(val what: String, val share: Float?) : Work

    /** The model writes. */
    data object Writing : Work

    /** The model is timed; [done] of [rows]. */
    data class Timing(val done: Int, val rows: Int) : Work
}
