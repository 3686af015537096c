package dev.rmseedge.core.measure

import java.io.File
import java.io.IOException

/** Resident memory of this process in bytes: now, and at most so far. */
data class ProcessMemory(val resident: Long, val peak: Long) {
    companion object {
        /** From `/proc/self/status`, which Linux and Android have; null: the system does not tell. */
        fun now(): ProcessMemory? = try {
            val fields = File("/proc/self/status").readLines().associate { it.substringBefore(':') to it.substringAfter(':') }
            fun bytes(name: String) = fields.getValue(name).trim().substringBefore(' ').toLong() * 1024
            ProcessMemory(bytes("VmRSS"), bytes("VmHWM"))
        } catch (_: IOException) {
            null
        } catch (_: NoSuchElementException) {
            null
        }
    }
}
