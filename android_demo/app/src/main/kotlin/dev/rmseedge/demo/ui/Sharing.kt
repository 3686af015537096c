package dev.rmseedge.demo.ui

import android.app.Activity
import android.content.ActivityNotFoundException
import android.content.Intent

/** Hands a text to an app that the user chooses. */
fun Activity.shareText(text: String, type: String) {
    val send = Intent(Intent.ACTION_SEND).setType(type).putExtra(Intent.EXTRA_TEXT, text)
    startActivity(Intent.createChooser(send, null))
}

/** Lets the user choose a file; the answer comes to `onActivityResult` with [request]. False: no app here can. */
fun Activity.chooseFile(intent: Intent, request: Int): Boolean = try {
    startActivityForResult(intent.addCategory(Intent.CATEGORY_OPENABLE), request)
    true
} catch (_: ActivityNotFoundException) {
    false
}
