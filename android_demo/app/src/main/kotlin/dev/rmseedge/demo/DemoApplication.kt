package dev.rmseedge.demo

import android.app.Application
import dev.rmseedge.demo.work.Workspace

/** Holds what outlives a screen: a rotation makes a new one while the model goes on writing. */
class DemoApplication : Application() {
    lateinit var workspace: Workspace
        private set

    override fun onCreate() {
        super.onCreate()
        workspace = Workspace(this)
    }
}
