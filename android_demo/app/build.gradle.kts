plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
}

// An installed build of ExecuTorch's sources for Android, a folder for each ABI; without it, the app runs ONNX packages only.
// ./gradlew assembleDebug -PexecutorchPrefix=/path/to/installed
val executorch: String? = providers.gradleProperty("executorchPrefix").orNull

android {
    namespace = "dev.rmseedge.demo"
    compileSdk = libs.versions.compileSdk.get().toInt()

    defaultConfig {
        applicationId = libs.versions.applicationId.get()
        minSdk = libs.versions.minSdk.get().toInt()
        targetSdk = libs.versions.targetSdk.get().toInt()
        versionCode = libs.versions.versionCode.get().toInt()
        versionName = libs.versions.versionName.get()
        ndk.abiFilters += listOf("arm64-v8a", "x86_64")
        if (executorch != null) {
            externalNativeBuild.cmake.arguments += listOf("-DANDROID_STL=c++_shared", "-DEXECUTORCH_PREFIX=$executorch")
        }
    }

    if (executorch != null) {
        externalNativeBuild.cmake {
            path = file("../native/CMakeLists.txt")
            version = libs.versions.cmake.get()
        }
    }

    sourceSets["main"].assets.srcDir("../../build/android/assets") // where build_apk.sh puts a package, or anyone

    androidResources.noCompress += "zip"
    packaging.jniLibs.useLegacyPackaging = true // libraries are compressed in the APK, and unpacked when it is installed

    compileOptions {
        sourceCompatibility = JavaVersion.toVersion(libs.versions.jvm.get())
        targetCompatibility = JavaVersion.toVersion(libs.versions.jvm.get())
    }
}

kotlin {
    compilerOptions {
        jvmTarget = org.jetbrains.kotlin.gradle.dsl.JvmTarget.fromTarget(libs.versions.jvm.get())
        allWarningsAsErrors = true
    }
}

dependencies {
    implementation(project(":core"))
    implementation(libs.onnxruntime.android)
    implementation(libs.gson)
}
