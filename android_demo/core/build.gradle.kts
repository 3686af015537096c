plugins {
    alias(libs.plugins.kotlin.jvm)
}

kotlin {
    compilerOptions {
        jvmTarget = org.jetbrains.kotlin.gradle.dsl.JvmTarget.fromTarget(libs.versions.jvm.get())
        allWarningsAsErrors = true
    }
}

java {
    sourceCompatibility = JavaVersion.toVersion(libs.versions.jvm.get())
    targetCompatibility = JavaVersion.toVersion(libs.versions.jvm.get())
}

dependencies {
    compileOnly(libs.onnxruntime) // the app brings Android's build of the same classes
    testImplementation(libs.onnxruntime)
    implementation(libs.gson)
}
