"""`android.jar` out of a list of an API: what Java's own tools find in it is what the list says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from android_demo.stubs.jar import write_jar
from android_demo.stubs.signatures import Type, read_signatures

LISTED = """// Signature format: 2.0
package java.lang {

  public class Object {
    ctor public Object();
  }

  public abstract class Enum<E extends java.lang.Enum<E>> {
    ctor protected Enum(@NonNull String, int);
  }

  public final class String {
  }

  @java.lang.FunctionalInterface public interface Runnable {
    method public void run();
  }

}

package java.lang.annotation {

  public interface Annotation {
  }

}

package a.b {

  public abstract class Box<T extends java.lang.Runnable> implements java.lang.Runnable {
    ctor public Box();
    method @CallSuper public abstract void fill(int);
    method @RequiresPermission(anyOf={"a)", "b"}) public static <U, V extends U> V[] pick(@NonNull a.b.Box<? super U>, V...) throws a.b.Wrong;
    field public static final long BIG = 9223372036854775807L; // 0x7fffffffffffffffL
    field public static final char LETTER = 59; // 0x003b ';'
    field public static final double NONE = (0.0/0.0);
    field @Deprecated public static final String TEXT = "a; // \\"b\\"";
    field protected T held;
  }

  public class Box.Inner {
    ctor public Box.Inner(T);
  }

  public static interface Box.Reader {
    method public default int read();
  }

  public class Crate extends a.b.Plain {
    ctor public Crate();
  }

  public enum Kind {
    enum_constant public static final a.b.Kind ONE;
    enum_constant public static final a.b.Kind TWO;
  }

  @java.lang.annotation.Retention public @interface Mark {
    method public abstract int value() default 0;
  }

  public abstract class Plain {
    ctor public Plain();
    method protected abstract void layOut(boolean, int[]);
  }

  public class Wrong {
  }

}
"""


def test_lists_are_read() -> None:
    classes = {cls.full_name: cls for cls in read_signatures(LISTED)}
    assert list(classes)[-8:] == [f"a.b.{n}" for n in "Box Box.Inner Box.Reader Crate Kind Mark Plain Wrong".split()]
    box = classes["a.b.Box"]
    assert box.modifiers == {"public", "abstract"} and [t.name for t in box.implements] == ["java.lang.Runnable"]
    fill, pick = box.methods[1:]
    assert (fill.name, fill.parameters, fill.variable) == ("fill", (Type("int"),), False)
    assert pick.variable and pick.returns == Type("V", dimensions=1) and pick.throws == (Type("a.b.Wrong"),)
    assert pick.parameters[0] == Type("a.b.Box", (Type("U", bound="-"),))
    assert [f.value for f in box.fields] == ["9223372036854775807L", "59", "(0.0/0.0)", '"a; // \\"b\\""', None]


@pytest.fixture(scope="module")
def jar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stubs") / "stubs.jar"
    assert write_jar(LISTED, path) == 13
    return path


EXPECTED = {
    "a.b.Box": [
        "public abstract class a.b.Box<T extends java.lang.Runnable> implements java.lang.Runnable",
        "public static final long BIG = 9223372036854775807l;",
        "public static final char LETTER = ';';",
        "public static final double NONE = NaNd;",
        'public static final java.lang.String TEXT = "a; // \\"b\\"";',
        "protected T held;",
        "public abstract void fill(int);",
        "public static <U, V extends U> V[] pick(a.b.Box<? super U>, V...) throws a.b.Wrong;",
    ],
    "a.b.Box$Inner": ["public class a.b.Box$Inner", "public a.b.Box$Inner(a.b.Box, java.lang.Runnable);"],
    "a.b.Box$Reader": ["public interface a.b.Box$Reader", "public default int read();"],
    "a.b.Crate": ["public class a.b.Crate extends a.b.Plain", "protected void layOut(boolean, int[]);"],
    "a.b.Kind": [
        "public final class a.b.Kind extends java.lang.Enum<a.b.Kind>",
        "public static final a.b.Kind ONE;",
        "public static final a.b.Kind TWO;",
    ],
    "a.b.Mark": [
        "public interface a.b.Mark extends java.lang.annotation.Annotation",
        "public abstract int value();",
    ],
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("javap") is None, reason="needs a JDK")
@pytest.mark.parametrize("name", EXPECTED)
def test_java_finds_what_the_list_says(name: str, jar: Path) -> None:
    command = ["javap", "-protected", "-constants", "-cp", str(jar), name]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for line in EXPECTED[name]:
        assert line in found


USER = """
package a.b;
class User extends Crate {
    enum Own { A }
    @Mark(3) static long of(Kind kind, Box<Runnable> box) throws Wrong {
        Box<Runnable>.Inner inner = box.new Inner(() -> {});
        Runnable[] some = Box.<Runnable, Runnable>pick(null, () -> {}, () -> {});
        return kind == Kind.ONE ? Box.BIG : some.length;
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK")
def test_java_compiles_against_it(jar: Path, tmp_path: Path) -> None:
    """Generic types, inner and concrete classes, constants, variable arguments: what uses them as the list says compiles."""
    listed = LISTED.replace("public class Wrong {", "public class Wrong extends java.lang.Throwable {")
    listed = listed.replace(
        "  public final class String {", "  public class Throwable {\n  }\n\n  public final class String {"
    )
    write_jar(listed, tmp_path / "all.jar")
    (tmp_path / "User.java").write_text(USER)
    # java.* itself is the compiler's; the rest is ours.
    subprocess.run(["unzip", "-q", "all.jar", "a/*", "-d", "classes"], cwd=tmp_path, check=True)
    command = ["javac", "-cp", "classes", "-d", "out", "User.java"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "User.java").write_text(USER.replace("Kind.ONE", "Kind.THREE"))
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
