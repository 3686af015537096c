package dev.rmseedge.demo.work

import android.content.Context
import android.net.Uri
import android.provider.OpenableColumns
import dev.rmseedge.core.UserException
import dev.rmseedge.core.pack.Archive
import dev.rmseedge.demo.logic.modelName
import dev.rmseedge.demo.logic.unusedName
import java.io.File
import java.io.IOException

/** The packages on this device: each a folder of the app's own, which engines read by path. */
class ModelStore(private val context: Context) {
    private val root = File(context.filesDir, "models").apply { mkdirs() }

    init {
        Archive.tidy(root)
    }

    /** Their names, in order. */
    val names: List<String> get() = root.list().orEmpty().filter { !it.startsWith(".") }.sorted()

    private val asset: String? get() = context.assets.list("")?.firstOrNull { it.endsWith(SUFFIX) }

    fun folder(name: String): File = File(root, name)

    /** Unpacks the package inside the app, unless that was done, and returns its name; null: it was built without one. Blocks. */
    fun unpackBundled(progress: (Long, Long) -> Unit): String? {
        val file = asset ?: return null
        val name = modelName(file)
        if (name !in names || isOutdated(name)) context.assets.open(file).use { Archive.unpack(it, root, name, progress = progress) }
        return name
    }

    /** Whether a package is that of an app that was updated since it was unpacked. */
    fun isOutdated(name: String): Boolean {
        val updated = context.packageManager.getPackageInfo(context.packageName, 0).lastUpdateTime
        return name == asset?.let(::modelName) && folder(name).lastModified() < updated
    }

    /** Unpacks the archive that the user chose. Blocks. Returns its name here. */
    @Throws(UserException::class)
    fun add(archive: Uri, progress: (Long, Long) -> Unit): String {
        val name = unusedName(modelName(displayName(archive)), names)
        try {
            val stream = context.contentResolver.openInputStream(archive) ?: throw UserException("the file cannot be opened")
            stream.use { Archive.unpack(it, root, name, progress = progress) }
        } catch (error: IOException) {
            throw UserException("the file cannot be read (${error.message})", error)
        } catch (error: SecurityException) {
            throw UserException("the file may not be read any more; choose it again", error)
        }
        return name
    }

    /** Removes a package that is not loaded. */
    fun remove(name: String) {
        folder(name).deleteRecursively()
    }

    private fun displayName(uri: Uri): String {
        val columns = arrayOf(OpenableColumns.DISPLAY_NAME)
        val found = context.contentResolver.query(uri, columns, null, null, null)?.use { rows ->
            if (rows.moveToFirst()) rows.getString(0) else null
        }
        return found ?: uri.lastPathSegment.orEmpty()
    }

    private companion object {
        const val SUFFIX = ".rmse.zip"
    }
}
