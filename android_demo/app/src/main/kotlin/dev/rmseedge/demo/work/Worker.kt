package dev.rmseedge.demo.work

import ai.onnxruntime.OrtException
import dev.rmseedge.core.UserException
import java.io.IOException
import java.util.concurrent.Executors

/**
 * The one thread that models run on: what the user asks for is done in order, and never on the main thread.
 *
 * @param failed told, on that thread, why something could not be done: one sentence.
 */
class Worker(private val failed: (String) -> Unit) {
    private val executor = Executors.newSingleThreadExecutor { Thread(it, "model") }

    /** Does [task], then [after] whatever came of it. Defects of the program pass, and end it with their trace. */
    fun submit(after: () -> Unit = {}, task: () -> Unit) {
        executor.execute {
            try {
                task()
            } catch (error: UserException) {
                failed(error.message.orEmpty())
            } catch (error: IOException) {
                failed("a file cannot be read or written (${error.message}); is the storage full?")
            } catch (error: OrtException) {
                failed("the engine failed: ${error.message.orEmpty().lineSequence().first()}")
            } catch (_: OutOfMemoryError) {
                failed("there is not enough memory; close other apps, or choose a smaller package")
            } finally {
                after()
            }
        }
    }
}
