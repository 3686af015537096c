package dev.rmseedge.demo.work

import android.app.ActivityManager
import android.content.Context
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.demo.logic.MemoryForecast

/** The memory of this device. */
class DeviceMemory(context: Context) {
    private val manager = context.getSystemService(ActivityManager::class.java)

    /** What a package would leave. */
    fun forecast(pack: LoopPackage): MemoryForecast {
        val info = ActivityManager.MemoryInfo().also(manager::getMemoryInfo)
        return MemoryForecast(pack.predictedBytes(), info.availMem, info.threshold, pack.target.engine, pack.expertBytes > 0)
    }
}
