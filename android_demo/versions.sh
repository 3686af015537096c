# What the app says of itself, and what it runs on. gradle/libs.versions.toml says the same to Gradle; tests/android/test_gradle.py compares them.
APPLICATION_ID=dev.rmseedge.demo
VERSION_CODE=1
VERSION_NAME=0.1.0
MIN_SDK=29
TARGET_SDK=34
ABIS="arm64-v8a x86_64"
ONNXRUNTIME=1.29.0
