package dev.rmseedge.demo.work

import android.content.SharedPreferences
import dev.rmseedge.demo.logic.Notes

/** [Notes] in shared preferences, written before the call returns: what comes next may end the process. */
class PreferenceNotes(private val preferences: SharedPreferences) : Notes {
    override fun get(name: String): String? = preferences.getString(name, null)

    override fun commit(changes: Map<String, String?>) {
        val editor = preferences.edit()
        for ((name, value) in changes) editor.putString(name, value) // null removes
        editor.commit()
    }
}
