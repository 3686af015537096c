"""`android.jar` to compile against, made from the list of Android's public API (AOSP's `api/current.txt`).

    python -m android_demo.stubs current.txt android.jar

`signatures.py` reads the list, `classfile.py` writes classes, `jar.py` puts the one into the other.
"""
