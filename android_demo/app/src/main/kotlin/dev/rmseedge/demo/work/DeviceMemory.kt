package dev.rmseedge.demo.work

import android.app.ActivityManager
import android.content.Context
import dev.rmseedge.demo.logic.MemoryForecast

/** The memory of this device. */
class DeviceMemory(context: Context) {
    private val manager = context.getSystemService(ActivityManager::class.java)

    /** What a package that needs so many bytes would leave. */
    fun forecast(needed: Long): MemoryForecast {
        val info = ActivityManager.MemoryInfo().also(manager::getMemoryInfo)
        return MemoryForecast(needed, info.availMem, info.threshold)
    }
}
