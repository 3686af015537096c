package dev.rmseedge.core.pack

import dev.rmseedge.core.PackageException
import dev.rmseedge.core.json.Json
import java.io.ByteArrayOutputStream
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.io.OutputStream
import java.nio.file.Files
import java.nio.file.StandardCopyOption
import java.util.zip.ZipEntry
import java.util.zip.ZipFile

/**
 * A package in one zip file, the package's files at its root: what `rmse-export --archive` writes and file pickers hand over.
 *
 * Nothing is taken on trust: every entry must be a file that the package lists, no more is written than the manifest says that it
 * has, and what was written is verified like any package. It becomes visible only then, whole, under its name; whatever fails
 * leaves nothing behind.
 */
object Archive {
    private const val SCRATCH = ".unpacking-"
    private const val SPARE = 32L shl 20 // bytes of the disk that stay free

    /**
     * Unpacks the package in [archive] to the folder [name] of [parent], in place of what is there.
     *
     * @param label what messages call the archive.
     * @param free bytes that may be written.
     */
    @Throws(PackageException::class)
    fun unpack(
        archive: File,
        parent: File,
        name: String,
        target: String = LoopPackage.TARGET,
        label: String = archive.name,
        free: () -> Long = { parent.usableSpace - SPARE },
        progress: Progress = { _, _ -> },
    ): LoopPackage = inScratch(parent, label) { scratch ->
        unpackInto(scratch, archive, File(parent, name), target, label, free, progress)
    }

    /** The same of a stream that can be read only once, such as a file picker's; it is closed. */
    @Throws(PackageException::class)
    fun unpack(
        archive: InputStream,
        parent: File,
        name: String,
        target: String = LoopPackage.TARGET,
        label: String = name,
        free: () -> Long = { parent.usableSpace - SPARE },
        progress: Progress = { _, _ -> },
    ): LoopPackage = inScratch(parent, label) { scratch ->
        val copy = File(scratch, "archive.zip")
        val room = free()
        archive.use { input -> copy.outputStream().use { copy(input, it, room) { throw tooLarge(label, room) } } }
        unpackInto(File(scratch, "files").apply { mkdir() }, copy, File(parent, name), target, label, free, progress)
    }

    /** Removes what a process left in [parent] that ended while it unpacked. */
    fun tidy(parent: File) {
        parent.listFiles { file -> file.name.startsWith(SCRATCH) }?.forEach(File::deleteRecursively)
    }

    private fun inScratch(parent: File, label: String, work: (File) -> LoopPackage): LoopPackage {
        var scratch: File? = null
        try {
            scratch = Files.createTempDirectory(parent.toPath(), SCRATCH).toFile()
            return work(scratch)
        } catch (error: IOException) {
            throw PackageException("$label: cannot be unpacked (${error.message}); copy it again, or free some space", error)
        } finally {
            scratch?.deleteRecursively()
        }
    }

    private fun unpackInto(
        folder: File, archive: File, destination: File, target: String, label: String, free: () -> Long, progress: Progress,
    ): LoopPackage {
        open(archive, label).use { zip ->
            val entries = entries(zip, label)
            val index = PackageIndex.read(
                label, small(zip, entries, label, PackageIndex.MANIFEST), small(zip, entries, label, PackageIndex.SUMS), target,
            )
            write(zip, entries, index, folder, label, free, progress)
        }
        val found = LoopPackage.open(folder, target, label)
        replace(destination, folder)
        return found.movedTo(destination)
    }

    private fun open(archive: File, label: String): ZipFile = try {
        ZipFile(archive)
    } catch (error: IOException) {
        throw noZip(label, error)
    } catch (error: IllegalArgumentException) { // of names that are not UTF-8, in some versions
        throw noZip(label, error)
    }

    private fun noZip(label: String, error: Exception) =
        PackageException("$label: not a zip file, or not all of it (${error.message}); copy it again", error)

    /** The files of the archive by their names, which lead nowhere but below the folder that they are unpacked to. */
    private fun entries(zip: ZipFile, label: String): Map<String, ZipEntry> {
        val entries = linkedMapOf<String, ZipEntry>()
        for (entry in zip.entries()) {
            val parts = entry.name.removeSuffix("/").split('/')
            if (parts.any { it.isEmpty() || it == "." || it == ".." } || entry.name.any { it == '\\' || it.isISOControl() }) {
                throw PackageException("$label: its entry ${entry.name.take(200)} would be written elsewhere; nothing was unpacked")
            }
            if (entry.isDirectory) continue
            if (entries.put(entry.name, entry) != null) {
                throw PackageException("$label: holds ${entry.name.take(200)} twice; nothing was unpacked")
            }
        }
        return entries
    }

    private fun small(zip: ZipFile, entries: Map<String, ZipEntry>, label: String, name: String): ByteArray {
        val entry = entries[name] ?: throw PackageException("$label: holds no $name; it is not a package (make one with rmse-export --archive)")
        return zip.getInputStream(entry).use { input ->
            val bytes = ByteArrayOutputStream()
            copy(input, bytes, Json.LARGEST.toLong()) {
                throw PackageException("$label/$name: larger than ${Json.LARGEST shr 20} MiB, which no such file is; export the package again")
            }
            bytes.toByteArray()
        }
    }

    private fun write(
        zip: ZipFile, entries: Map<String, ZipEntry>, index: PackageIndex, folder: File, label: String, free: () -> Long, progress: Progress,
    ) {
        (index.files - entries.keys).firstOrNull()?.let { throw PackageException("$label/$it: missing from the package; export it again") }
        (entries.keys - index.files).firstOrNull()?.let {
            throw PackageException("$label/${it.take(200)}: not listed in the package's ${PackageIndex.SUMS}; export it again")
        }
        val total = index.sizes.values.fold(0L) { sum, size -> minOf(sum, Long.MAX_VALUE - size) + size }
        val room = free()
        if (total > room) throw tooLarge(label, room, total)
        var done = 0L
        for ((name, entry) in entries) {
            val size = index.sizes[name] ?: Json.LARGEST.toLong() // the manifest and the list: they were read whole before
            val file = File(folder, name).apply { parentFile?.mkdirs() }
            val wrong = { throw PackageException("$label/$name: unpacks to more than the $size bytes that the manifest says; the archive is damaged, export again") }
            zip.getInputStream(entry).use { input ->
                file.outputStream().use { output -> copy(input, output, size, { done += it; progress(done, total) }, wrong) }
            }
        }
    }

    /** Puts the folder in the place of the destination; what stands there goes only now that the new one is whole. */
    private fun replace(destination: File, folder: File) {
        val old = File(folder.parentFile, "${folder.name}-before")
        if (destination.exists()) Files.move(destination.toPath(), old.toPath(), StandardCopyOption.ATOMIC_MOVE)
        Files.move(folder.toPath(), destination.toPath(), StandardCopyOption.ATOMIC_MOVE)
        old.deleteRecursively()
    }

    private fun copy(input: InputStream, output: OutputStream, most: Long, progress: (Int) -> Unit = {}, beyond: () -> Nothing) {
        val piece = ByteArray(1 shl 16)
        var left = most
        while (true) {
            val count = input.read(piece)
            if (count < 0) return
            left -= count
            if (left < 0) beyond()
            output.write(piece, 0, count)
            progress(count)
        }
    }

    private fun tooLarge(label: String, room: Long, total: Long? = null): PackageException {
        val needs = if (total == null) "is larger than" else "needs $total bytes, more than"
        return PackageException("$label: $needs the ${maxOf(0, room)} bytes that are free here; nothing was unpacked, free some space")
    }
}
