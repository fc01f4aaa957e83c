; The inner loops of folding bfloat16, for whole vectors of whatever processor it is compiled on (kernel.py).
; But for the two sums no operation has a fast-math flag: nothing is reassociated or contracted, or the error bounds of rows.py
; would not hold. raw and out hold bfloat16 as i16, y the change of b; e bounds the error of y in any entry.

declare float @llvm.fabs.f32(float)
declare i32 @llvm.umax.i32(i32, i32)
declare i64 @llvm.umin.i64(i64, i64)

; exact, into float64
define void @widen(ptr noalias %raw, ptr noalias %out, i64 %n) {
start:
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %single = call float @widened(ptr %raw.i)
  %b = fpext float %single to double
  %out.i = getelementptr inbounds double, ptr %out, i64 %i
  store double %b, ptr %out.i, align 8
  %next = add nuw nsw i64 %i, 1
  %end = icmp eq i64 %next, %n
  br i1 %end, label %done, label %loop
done:
  ret void
}

; y[i] += gate[i] * b[i]
define void @gated(ptr noalias %raw, ptr noalias %y, ptr noalias %gate, i64 %n) {
start:
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %b = call float @widened(ptr %raw.i)
  %gate.i = getelementptr inbounds float, ptr %gate, i64 %i
  %factor = load float, ptr %gate.i, align 4
  %more = fmul float %factor, %b
  %y.i = getelementptr inbounds float, ptr %y, i64 %i
  %old = load float, ptr %y.i, align 4
  %new = fadd float %old, %more
  store float %new, ptr %y.i, align 4
  %next = add nuw nsw i64 %i, 1
  %end = icmp eq i64 %next, %n
  br i1 %end, label %done, label %loop
done:
  ret void
}

; out = b + y, to nearest; ties may go either way here, they are not decided
define void @narrow(ptr noalias %raw, ptr noalias %y, ptr noalias %out, i64 %n) {
start:
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %b = call float @widened(ptr %raw.i)
  %y.i = getelementptr inbounds float, ptr %y, i64 %i
  %change = load float, ptr %y.i, align 4
  %z = fadd float %b, %change
  %bits = bitcast float %z to i32
  %up = add i32 %bits, 32768
  %high = lshr i32 %up, 16
  %stored = trunc i32 %high to i16
  %out.i = getelementptr inbounds i16, ptr %out, i64 %i
  store i16 %stored, ptr %out.i, align 2
  %next = add nuw nsw i64 %i, 1
  %end = icmp eq i64 %next, %n
  br i1 %end, label %done, label %loop
done:
  ret void
}

; The number of entries of out that are not decided. To sums it adds those of y y and y d, d = exact - stored. At top the bits of the
; largest |d| (of floats that are not negative the bits have the same order).
define internal i32 @seen(ptr noalias %raw, ptr noalias %y, float %e, ptr noalias %out, ptr noalias %sums, ptr noalias %top, i64 %n) alwaysinline {
start:
  %top.before = load i32, ptr %top, align 4
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %loop ]
  %largest = phi i32 [ %top.before, %start ], [ %larger, %loop ]
  %unsure = phi i32 [ 0, %start ], [ %more, %loop ]
  %yy = phi float [ 0.0, %start ], [ %yy.more, %loop ]
  %yd = phi float [ 0.0, %start ], [ %yd.more, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %b = call float @widened(ptr %raw.i)
  %y.i = getelementptr inbounds float, ptr %y, i64 %i
  %change = load float, ptr %y.i, align 4
  %out.i = getelementptr inbounds i16, ptr %out, i64 %i
  %s = call float @widened(ptr %out.i)
  %d = call float @gap(float %b, float %change, float %s)
  %size = call float @llvm.fabs.f32(float %d)
  %size.bits = bitcast float %size to i32
  %larger = call i32 @llvm.umax.i32(i32 %largest, i32 %size.bits)
  %z = fadd float %b, %change
  %sure = call i1 @decided(float %size, float %e, float %z)
  %one = select i1 %sure, i32 0, i32 1
  %more = add i32 %unsure, %one
  %square = fmul float %change, %change
  %yy.more = fadd reassoc float %yy, %square
  %lost = fmul float %change, %d
  %yd.more = fadd reassoc float %yd, %lost
  %next = add nuw nsw i64 %i, 1
  %end = icmp eq i64 %next, %n
  br i1 %end, label %done, label %loop
done:
  store i32 %larger, ptr %top, align 4
  call void @sum(ptr %sums, float %yy.more)
  %second = getelementptr inbounds double, ptr %sums, i64 1
  call void @sum(ptr %second, float %yd.more)
  ret i32 %more
}

; the indices of the entries not decided, counted on from ``from``, into which; their number
define internal i64 @listed(ptr noalias %raw, ptr noalias %y, float %e, ptr noalias %out, ptr noalias %which, i64 %from, i64 %n) noinline {
start:
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %loop ]
  %count = phi i64 [ 0, %start ], [ %counted, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %b = call float @widened(ptr %raw.i)
  %y.i = getelementptr inbounds float, ptr %y, i64 %i
  %change = load float, ptr %y.i, align 4
  %out.i = getelementptr inbounds i16, ptr %out, i64 %i
  %s = call float @widened(ptr %out.i)
  %d = call float @gap(float %b, float %change, float %s)
  %size = call float @llvm.fabs.f32(float %d)
  %z = fadd float %b, %change
  %sure = call i1 @decided(float %size, float %e, float %z)
  %place = getelementptr inbounds i64, ptr %which, i64 %count
  %index = add i64 %from, %i
  store i64 %index, ptr %place, align 8             ; overwritten by the next when this one is decided
  %one = select i1 %sure, i64 0, i64 1
  %counted = add i64 %count, %one
  %next = add nuw nsw i64 %i, 1
  %end = icmp eq i64 %next, %n
  br i1 %end, label %done, label %loop
done:
  ret i64 %counted
}

; All entries, 64 at a time, so that few need be searched. which: one longer than raw. Returns the number of entries not decided.
define i64 @check(ptr noalias %raw, ptr noalias %y, float %e, ptr noalias %out, ptr noalias %which, ptr noalias %sums, ptr noalias %top, i64 %n) {
start:
  br label %loop
loop:
  %from = phi i64 [ 0, %start ], [ %to, %chunk ]
  %found = phi i64 [ 0, %start ], [ %found.now, %chunk ]
  %left = sub i64 %n, %from
  %size = call i64 @llvm.umin.i64(i64 %left, i64 64)
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %from
  %y.i = getelementptr inbounds float, ptr %y, i64 %from
  %out.i = getelementptr inbounds i16, ptr %out, i64 %from
  %unsure = call i32 @seen(ptr %raw.i, ptr %y.i, float %e, ptr %out.i, ptr %sums, ptr %top, i64 %size)
  %none = icmp eq i32 %unsure, 0
  br i1 %none, label %chunk, label %search
search:
  %which.i = getelementptr inbounds i64, ptr %which, i64 %found
  %here = call i64 @listed(ptr %raw.i, ptr %y.i, float %e, ptr %out.i, ptr %which.i, i64 %from, i64 %size)
  %found.more = add i64 %found, %here
  br label %chunk
chunk:
  %found.now = phi i64 [ %found, %loop ], [ %found.more, %search ]
  %to = add i64 %from, %size
  %end = icmp eq i64 %to, %n
  br i1 %end, label %done, label %loop
done:
  ret i64 %found.now
}

define internal float @widened(ptr %place) alwaysinline {
  %raw = load i16, ptr %place, align 2
  %wide = zext i16 %raw to i32
  %bits = shl i32 %wide, 16
  %b = bitcast i32 %bits to float
  ret float %b
}

; (b - s) + y
define internal float @gap(float %b, float %y, float %s) alwaysinline {
  %less = fsub float %b, %s
  %d = fadd float %less, %y
  ret float %d
}

define internal void @sum(ptr %place, float %value) alwaysinline {
  %old = load double, ptr %place, align 8
  %wide = fpext float %value to double
  %new = fadd double %old, %wide
  store double %new, ptr %place, align 8
  ret void
}

; size + e < half the spacing of bfloat16 at z; where that has no float of its own it is negative here, so nothing is less
define internal i1 @decided(float %size, float %e, float %z) alwaysinline {
  %bits = bitcast float %z to i32
  %exponent = and i32 %bits, 2139095040
  %half.bits = sub i32 %exponent, 67108864
  %half = bitcast i32 %half.bits to float
  %most = fadd float %size, %e
  %sure = fcmp olt float %most, %half
  ret i1 %sure
}
