package dev.rmseedge.demo.work

import android.content.Context
import android.net.Uri
import dev.rmseedge.core.UserException
import dev.rmseedge.core.model.Dials
import dev.rmseedge.core.pack.LoopPackage
import dev.rmseedge.demo.R
import dev.rmseedge.demo.logic.CpuCores
import dev.rmseedge.demo.logic.LoadGuard
import dev.rmseedge.demo.logic.LoadSettings
import dev.rmseedge.demo.logic.MemoryForecast
import dev.rmseedge.demo.logic.bytesText
import java.io.File

/** All that the screen shows and asks for: the packages, the one that is loaded, and the text that it writes. */
class Workspace(private val context: Context) {
    private val notes = PreferenceNotes(context.getSharedPreferences("notes", Context.MODE_PRIVATE))
    private val guard = LoadGuard(notes)
    private val worker = Worker { notice.value = it }
    val models = ModelStore(context)
    val memory = DeviceMemory(context)
    val cores = CpuCores.read()
    val work = Live<Work>(Work.Idle)
    val loaded = Live<Loaded?>(null)

    /** The latest sentence for the user; empty: there is none. */
    val notice = Live("")

    /** The names of the packages. */
    val names = Live(models.names)
    val writing = Writing(context, TranscriptStore(File(context.filesDir, "texts")), notes, notice)
    val timing = Timing(context, work)

    private var checked: LoopPackage? = null // verified last, on the thread of models

    init {
        start()
    }

    /** Unpacks and loads the package inside the app. */
    fun loadBundled() = prepare(context.getString(R.string.unpacking)) { progress ->
        val name = models.unpackBundled(progress)
        names.value = models.names
        if (name == null) notice.value = context.getString(R.string.no_bundled_model) else open(LoadSettings(name, cores.threads), false)
    }

    /**
     * Loads a package in the place of the one that is loaded.
     *
     * @param insist though there seems to be too little memory.
     */
    fun load(settings: LoadSettings, insist: Boolean = false) =
        prepare(context.getString(R.string.loading, settings.model)) { open(settings, insist, it) }

    /** Unpacks the archive that the user chose. */
    fun add(archive: Uri) = prepare(context.getString(R.string.unpacking)) { progress ->
        val name = models.add(archive, progress)
        names.value = models.names
        notice.value = context.getString(R.string.added, name)
    }

    fun remove(name: String) = prepare(context.getString(R.string.removing, name)) {
        if (loaded.value?.settings?.model == name) unload()
        models.remove(name)
        checked = null
        names.value = models.names
    }

    /** Tells, on the thread of models, what loading a package would take; a bad package is a notice instead. */
    fun forecast(name: String, told: (MemoryForecast) -> Unit) = prepare(context.getString(R.string.checking, name)) { progress ->
        told(memory.forecast(verified(name, progress)))
    }

    /** Lets the model write on from [prompt]. */
    fun write(prompt: String) {
        val model = loaded.value ?: return
        if (begin(Work.Writing)) worker.submit(::end) { writing.write(model, prompt) }
    }

    /** Begins a new text. */
    fun renew() = prepare(null) { writing.renew(loaded.value) }

    /** Goes on with a kept text. */
    fun reopen(id: Long) = prepare(null) { writing.reopen(id, loaded.value) }

    /** Takes a kept text out. */
    fun forget(id: Long) = prepare(null) { writing.remove(id) }

    /** Writes a kept text into the file that the user chose, as JSON. */
    fun export(id: Long, file: Uri) {
        worker.submit {
            val text = writing.find(id)?.transcript ?: return@submit
            try {
                context.contentResolver.openOutputStream(file, "wt")?.use { it.write(text.toJson().toByteArray()) }
                notice.value = context.getString(R.string.exported)
            } catch (error: SecurityException) {
                notice.value = context.getString(R.string.not_exported, error.message)
            }
        }
    }

    /** Times the model. */
    fun time(settings: TimingSettings) {
        val model = loaded.value ?: return
        if (!begin(Work.Timing(0, 1))) return
        worker.submit(::end) {
            writing.aside(model) { timing.time(model, settings) }
        }
    }

    /** Compares this device with what the package gave where it was made. */
    fun report() {
        val model = loaded.value ?: return
        if (!begin(Work.Timing(0, 1))) return
        worker.submit(::end) {
            writing.aside(model) { timing.report(model, cores) }
        }
    }

    /** Ends what is being written or timed, soon. */
    fun stop() {
        writing.stop()
        timing.stop()
    }

    /** The sliders were moved: from the next token on. */
    fun turn(dials: Dials) {
        loaded.value?.dials = dials
        writing.turn(dials)
    }

    /** What worked is loaded again; at the very first start, the package inside the app. */
    private fun start() {
        worker.submit { writing.open() }
        val broken = guard.broken
        val start = guard.atStart?.takeIf { it.model in models.names }
        if (broken != null) {
            notice.value = context.getString(R.string.load_broke, broken.model, broken.threads)
            guard.failed() // said once; now it is up to the user
        }
        if (start != null && !models.isOutdated(start.model)) {
            load(start)
        } else if (broken == null) {
            loadBundled()
        }
    }

    private fun open(settings: LoadSettings, insist: Boolean, progress: (Long, Long) -> Unit = { _, _ -> }) {
        unload()
        val pack = verified(settings.model, progress)
        val forecast = memory.forecast(pack)
        if (!forecast.fits && !insist) {
            throw UserException(context.getString(R.string.too_little_memory, bytesText(forecast.needed), bytesText(forecast.free)))
        }
        guard.before(settings)
        var succeeded = false
        try {
            loaded.value = Loaded.open(settings, pack)
            succeeded = true
        } finally {
            if (succeeded) guard.succeeded(settings) else guard.failed()
        }
        if (pack.hasUnreadTemplate) notice.value = context.getString(R.string.template_unread, settings.model)
        writing.resume(loaded.value)
    }

    /** The package of this name, every byte of it verified. */
    private fun verified(name: String, progress: (Long, Long) -> Unit): LoopPackage {
        val folder = models.folder(name)
        checked?.takeIf { it.folder == folder }?.let { return it }
        return LoopPackage.open(folder, progress = progress).also { checked = it }
    }

    private fun unload() {
        loaded.value?.close()
        loaded.value = null
    }

    private fun prepare(what: String?, task: ((Long, Long) -> Unit) -> Unit) {
        if (!begin(Work.Preparing(what.orEmpty(), null))) return
        worker.submit(::end) {
            task { done, total -> work.value = Work.Preparing(what.orEmpty(), if (total > 0) done / total.toFloat() else null) }
        }
    }

    /** Whether nothing is being done, and this may be. */
    private fun begin(next: Work): Boolean {
        if (work.value != Work.Idle) return false
        if (next !is Work.Preparing) notice.value = ""
        work.value = next
        return true
    }

    private fun end() {
        work.value = Work.Idle
    }
}
