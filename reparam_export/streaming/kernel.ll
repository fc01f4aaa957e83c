; The inner loops of folding bfloat16, for whole vectors of whatever processor it is compiled on (kernel.py).
; But for the sums over a vector no operation has a fast-math flag: nothing else is reassociated, or the error bounds of rows.py would not
; hold (a fused multiply-add rounds less often than they allow for). raw and out hold bfloat16 as i16, y the change of b; e bounds the
; error of y in any entry.

declare i64 @llvm.umin.i64(i64, i64)
declare i16 @llvm.ctpop.i16(i16)
declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x i32> @llvm.umax.v16i32(<16 x i32>, <16 x i32>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare i32 @llvm.vector.reduce.umax.v16i32(<16 x i32>)
declare <16 x i16> @llvm.masked.load.v16i16.p0(ptr, i32, <16 x i1>, <16 x i16>)
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare void @llvm.masked.compressstore.v16i64(<16 x i64>, ptr, <16 x i1>)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)

; Rows of a weight: out = b + y rounded and checked, y = left right + b * (gate.left gate.right). Tiles of 16 x 512 entries, so that y and
; the gate stay in cache: both hold one tile. A product without left is not there. right, gate.right: packed (k, 32 columns at a time);
; probes: packed (4, 512 columns at a time); found, gate.found: (rows, 4), to which the probes of each product are added.
; Returns the number of entries not decided; which, sums, top: as check.
define i64 @fold(ptr %raw, ptr %out, i64 %rows, i64 %columns,
                 ptr %left, ptr %right, i64 %k, ptr %found, ptr %gate.left, ptr %gate.right, i64 %gate.k, ptr %gate.found,
                 ptr %probes, ptr %y, ptr %gate, float %e, ptr %which, ptr %sums, ptr %top) {
start:
  %plain = icmp eq i64 %k, 0
  %ungated = icmp eq i64 %gate.k, 0
  br label %down
down:
  %row = phi i64 [ 0, %start ], [ %row.next, %down.next ]
  %unsure.down = phi i64 [ 0, %start ], [ %unsure.more, %down.next ]
  %rows.left = sub i64 %rows, %row
  %high = call i64 @llvm.umin.i64(i64 %rows.left, i64 16)
  br label %across
across:
  %column = phi i64 [ 0, %down ], [ %column.next, %across.next ]
  %unsure.across = phi i64 [ %unsure.down, %down ], [ %unsure.more, %across.next ]
  %columns.left = sub i64 %columns, %column
  %wide = call i64 @llvm.umin.i64(i64 %columns.left, i64 512)
  br i1 %plain, label %clear, label %change
clear:
  call void @llvm.memset.p0.i64(ptr %y, i8 0, i64 32768, i1 false)
  br label %gates
change:
  call void @multiplied(ptr %left, ptr %right, i64 %k, i64 %row, i64 %high, i64 %column, i64 %wide, ptr %y)
  call void @probed(ptr %y, ptr %probes, ptr %found, i64 %row, i64 %high, i64 %column, i64 %wide)
  br label %gates
gates:
  br i1 %ungated, label %each, label %factor
factor:
  call void @multiplied(ptr %gate.left, ptr %gate.right, i64 %gate.k, i64 %row, i64 %high, i64 %column, i64 %wide, ptr %gate)
  call void @probed(ptr %gate, ptr %probes, ptr %gate.found, i64 %row, i64 %high, i64 %column, i64 %wide)
  br label %each
each:
  %i = phi i64 [ 0, %gates ], [ 0, %factor ], [ %i.next, %round ]
  %unsure = phi i64 [ %unsure.across, %gates ], [ %unsure.across, %factor ], [ %unsure.more, %round ]
  %row.i = add i64 %row, %i
  %row.start = mul i64 %row.i, %columns
  %first = add i64 %row.start, %column
  %tile.row = mul i64 %i, 512
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %first
  %out.i = getelementptr inbounds i16, ptr %out, i64 %first
  %y.i = getelementptr inbounds float, ptr %y, i64 %tile.row
  br i1 %ungated, label %round, label %multiply
multiply:
  %gate.i = getelementptr inbounds float, ptr %gate, i64 %tile.row
  call void @gated(ptr %raw.i, ptr %y.i, ptr %gate.i, i64 %wide)
  br label %round
round:
  %which.i = getelementptr inbounds i64, ptr %which, i64 %unsure
  call void @narrow(ptr %raw.i, ptr %y.i, ptr %out.i, i64 %wide)
  %here = call i64 @check(ptr %raw.i, ptr %y.i, float %e, ptr %out.i, ptr %which.i, ptr %sums, ptr %top, i64 %first, i64 %wide)
  %unsure.more = add i64 %unsure, %here
  %i.next = add nuw nsw i64 %i, 1
  %last = icmp eq i64 %i.next, %high
  br i1 %last, label %across.next, label %each
across.next:
  %column.next = add nuw nsw i64 %column, 512
  %right.end = icmp uge i64 %column.next, %columns
  br i1 %right.end, label %down.next, label %across
down.next:
  %row.next = add nuw nsw i64 %row, 16
  %bottom = icmp uge i64 %row.next, %rows
  br i1 %bottom, label %done, label %down
done:
  ret i64 %unsure.more
}

; A tile of the product, into y (16, 512): four rows and 32 columns at a time, so that the sums stay in registers. left: (rows, k), three
; rows longer than it need be.
define void @multiplied(ptr %left, ptr %right, i64 %k, i64 %row, i64 %rows, i64 %column, i64 %columns, ptr noalias %y) noinline {
start:
  %left.start = mul i64 %row, %k
  %right.start = mul i64 %column, %k
  %left.row = getelementptr inbounds float, ptr %left, i64 %left.start
  %right.column = getelementptr inbounds float, ptr %right, i64 %right.start
  br label %across
across:
  %j = phi i64 [ 0, %start ], [ %j.next, %across.next ]
  %panel.start = mul i64 %j, %k
  %panel = getelementptr inbounds float, ptr %right.column, i64 %panel.start
  br label %down
down:
  %i = phi i64 [ 0, %across ], [ %i.next, %store ]
  %a.start = mul i64 %i, %k
  %a = getelementptr inbounds float, ptr %left.row, i64 %a.start
  %b = getelementptr inbounds float, ptr %a, i64 %k
  %c = getelementptr inbounds float, ptr %b, i64 %k
  %d = getelementptr inbounds float, ptr %c, i64 %k
  br label %sum
sum:
  %n = phi i64 [ 0, %down ], [ %n.next, %sum ]
  %a0 = phi <16 x float> [ zeroinitializer, %down ], [ %a0.more, %sum ]
  %a1 = phi <16 x float> [ zeroinitializer, %down ], [ %a1.more, %sum ]
  %b0 = phi <16 x float> [ zeroinitializer, %down ], [ %b0.more, %sum ]
  %b1 = phi <16 x float> [ zeroinitializer, %down ], [ %b1.more, %sum ]
  %c0 = phi <16 x float> [ zeroinitializer, %down ], [ %c0.more, %sum ]
  %c1 = phi <16 x float> [ zeroinitializer, %down ], [ %c1.more, %sum ]
  %d0 = phi <16 x float> [ zeroinitializer, %down ], [ %d0.more, %sum ]
  %d1 = phi <16 x float> [ zeroinitializer, %down ], [ %d1.more, %sum ]
  %r.start = mul nuw nsw i64 %n, 32
  %r0.at = getelementptr inbounds float, ptr %panel, i64 %r.start
  %r1.at = getelementptr inbounds float, ptr %r0.at, i64 16
  %r0 = load <16 x float>, ptr %r0.at, align 4
  %r1 = load <16 x float>, ptr %r1.at, align 4
  %a.n = call <16 x float> @spread(ptr %a, i64 %n)
  %b.n = call <16 x float> @spread(ptr %b, i64 %n)
  %c.n = call <16 x float> @spread(ptr %c, i64 %n)
  %d.n = call <16 x float> @spread(ptr %d, i64 %n)
  %a0.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %a.n, <16 x float> %r0, <16 x float> %a0)
  %a1.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %a.n, <16 x float> %r1, <16 x float> %a1)
  %b0.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %b.n, <16 x float> %r0, <16 x float> %b0)
  %b1.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %b.n, <16 x float> %r1, <16 x float> %b1)
  %c0.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %c.n, <16 x float> %r0, <16 x float> %c0)
  %c1.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %c.n, <16 x float> %r1, <16 x float> %c1)
  %d0.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %d.n, <16 x float> %r0, <16 x float> %d0)
  %d1.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %d.n, <16 x float> %r1, <16 x float> %d1)
  %n.next = add nuw nsw i64 %n, 1
  %summed = icmp eq i64 %n.next, %k
  br i1 %summed, label %store, label %sum
store:
  %tile.row = mul nuw nsw i64 %i, 512
  %tile = add nuw nsw i64 %tile.row, %j
  %y.a = getelementptr inbounds float, ptr %y, i64 %tile
  %y.b = getelementptr inbounds float, ptr %y.a, i64 512
  %y.c = getelementptr inbounds float, ptr %y.b, i64 512
  %y.d = getelementptr inbounds float, ptr %y.c, i64 512
  call void @put(ptr %y.a, <16 x float> %a0.more, <16 x float> %a1.more)
  call void @put(ptr %y.b, <16 x float> %b0.more, <16 x float> %b1.more)
  call void @put(ptr %y.c, <16 x float> %c0.more, <16 x float> %c1.more)
  call void @put(ptr %y.d, <16 x float> %d0.more, <16 x float> %d1.more)
  %i.next = add nuw nsw i64 %i, 4
  %bottom = icmp uge i64 %i.next, %rows
  br i1 %bottom, label %across.next, label %down
across.next:
  %j.next = add nuw nsw i64 %j, 32
  %right.end = icmp uge i64 %j.next, %columns
  br i1 %right.end, label %done, label %across
done:
  ret void
}

define internal <16 x float> @spread(ptr %place, i64 %n) alwaysinline {
  %at = getelementptr inbounds float, ptr %place, i64 %n
  %value = load float, ptr %at, align 4
  %one = insertelement <16 x float> poison, float %value, i64 0
  %all = shufflevector <16 x float> %one, <16 x float> poison, <16 x i32> zeroinitializer
  ret <16 x float> %all
}

define internal void @put(ptr %place, <16 x float> %first, <16 x float> %second) alwaysinline {
  %next = getelementptr inbounds float, ptr %place, i64 16
  store <16 x float> %first, ptr %place, align 4
  store <16 x float> %second, ptr %next, align 4
  ret void
}

; found[row, p] += the sum over a tile's row of y * probe p
define internal void @probed(ptr noalias %y, ptr noalias %probes, ptr noalias %found, i64 %row, i64 %rows, i64 %column, i64 %columns) noinline {
start:
  %panel.start = mul i64 %column, 4
  %p0.start = getelementptr inbounds float, ptr %probes, i64 %panel.start
  %p1.start = getelementptr inbounds float, ptr %p0.start, i64 512
  %p2.start = getelementptr inbounds float, ptr %p1.start, i64 512
  %p3.start = getelementptr inbounds float, ptr %p2.start, i64 512
  br label %down
down:
  %i = phi i64 [ 0, %start ], [ %i.next, %store ]
  %tile.row = mul nuw nsw i64 %i, 512
  %y.row = getelementptr inbounds float, ptr %y, i64 %tile.row
  br label %sum
sum:
  %j = phi i64 [ 0, %down ], [ %j.next, %sum ]
  %s0 = phi <16 x float> [ zeroinitializer, %down ], [ %s0.more, %sum ]
  %s1 = phi <16 x float> [ zeroinitializer, %down ], [ %s1.more, %sum ]
  %s2 = phi <16 x float> [ zeroinitializer, %down ], [ %s2.more, %sum ]
  %s3 = phi <16 x float> [ zeroinitializer, %down ], [ %s3.more, %sum ]
  %y.j = getelementptr inbounds float, ptr %y.row, i64 %j
  %p0.j = getelementptr inbounds float, ptr %p0.start, i64 %j
  %p1.j = getelementptr inbounds float, ptr %p1.start, i64 %j
  %p2.j = getelementptr inbounds float, ptr %p2.start, i64 %j
  %p3.j = getelementptr inbounds float, ptr %p3.start, i64 %j
  %change = load <16 x float>, ptr %y.j, align 4
  %p0 = load <16 x float>, ptr %p0.j, align 4
  %p1 = load <16 x float>, ptr %p1.j, align 4
  %p2 = load <16 x float>, ptr %p2.j, align 4
  %p3 = load <16 x float>, ptr %p3.j, align 4
  %s0.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %change, <16 x float> %p0, <16 x float> %s0)
  %s1.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %change, <16 x float> %p1, <16 x float> %s1)
  %s2.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %change, <16 x float> %p2, <16 x float> %s2)
  %s3.more = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %change, <16 x float> %p3, <16 x float> %s3)
  %j.next = add nuw nsw i64 %j, 16
  %right.end = icmp uge i64 %j.next, %columns
  br i1 %right.end, label %store, label %sum
store:
  %row.i = add i64 %row, %i
  %f.start = mul i64 %row.i, 4
  %f0 = getelementptr inbounds double, ptr %found, i64 %f.start
  %f1 = getelementptr inbounds double, ptr %f0, i64 1
  %f2 = getelementptr inbounds double, ptr %f0, i64 2
  %f3 = getelementptr inbounds double, ptr %f0, i64 3
  %t0 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %s0.more)
  %t1 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %s1.more)
  %t2 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %s2.more)
  %t3 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %s3.more)
  call void @sum(ptr %f0, float %t0)
  call void @sum(ptr %f1, float %t1)
  call void @sum(ptr %f2, float %t2)
  call void @sum(ptr %f3, float %t3)
  %i.next = add nuw nsw i64 %i, 1
  %bottom = icmp uge i64 %i.next, %rows
  br i1 %bottom, label %done, label %down
done:
  ret void
}

; exact, into float64: rows of raw that lie ``stride`` entries apart
define void @widen(ptr noalias %raw, i64 %stride, ptr noalias %out, i64 %rows, i64 %columns) {
start:
  br label %down
down:
  %row = phi i64 [ 0, %start ], [ %row.next, %down.next ]
  %raw.start = mul i64 %row, %stride
  %out.start = mul i64 %row, %columns
  %raw.row = getelementptr inbounds i16, ptr %raw, i64 %raw.start
  %out.row = getelementptr inbounds double, ptr %out, i64 %out.start
  br label %loop
loop:
  %i = phi i64 [ 0, %down ], [ %next, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw.row, i64 %i
  %single = call float @single(ptr %raw.i)
  %b = fpext float %single to double
  %out.i = getelementptr inbounds double, ptr %out.row, i64 %i
  store double %b, ptr %out.i, align 8
  %next = add nuw nsw i64 %i, 1
  %end = icmp eq i64 %next, %columns
  br i1 %end, label %down.next, label %loop
down.next:
  %row.next = add nuw nsw i64 %row, 1
  %bottom = icmp eq i64 %row.next, %rows
  br i1 %bottom, label %done, label %down
done:
  ret void
}

; y[i] += gate[i] * b[i]
define internal void @gated(ptr noalias %raw, ptr noalias %y, ptr noalias %gate, i64 %n) noinline {
start:
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %b = call float @single(ptr %raw.i)
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

; out = b + y, to nearest; ties may go either way here, they are not decided. Not part of check, which reads what stands in out.
define internal void @narrow(ptr noalias %raw, ptr noalias %y, ptr noalias %out, i64 %n) noinline {
start:
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %loop ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %b = call float @single(ptr %raw.i)
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

; The number of entries of out that are not decided, and their indices, counted on from ``first``, into which. To sums it adds those of
; y y and y d, d = exact - stored. At top the bits of the largest |d| (of floats that are not negative the bits have the same order).
; What lies beyond the last whole vector is read as zeros, which change no sum.
define internal i64 @check(ptr noalias %raw, ptr noalias %y, float %e, ptr noalias %out, ptr noalias %which, ptr noalias %sums, ptr noalias %top, i64 %first, i64 %n) noinline {
start:
  %top.before = load i32, ptr %top, align 4
  %largest.one = insertelement <16 x i32> zeroinitializer, i32 %top.before, i64 0
  %e.one = insertelement <16 x float> poison, float %e, i64 0
  %e.all = shufflevector <16 x float> %e.one, <16 x float> poison, <16 x i32> zeroinitializer
  br label %loop
loop:
  %i = phi i64 [ 0, %start ], [ %next, %after ]
  %found = phi i64 [ 0, %start ], [ %found.now, %after ]
  %largest = phi <16 x i32> [ %largest.one, %start ], [ %larger, %after ]
  %yy = phi <16 x float> [ zeroinitializer, %start ], [ %yy.more, %after ]
  %yd = phi <16 x float> [ zeroinitializer, %start ], [ %yd.more, %after ]
  %raw.i = getelementptr inbounds i16, ptr %raw, i64 %i
  %out.i = getelementptr inbounds i16, ptr %out, i64 %i
  %y.i = getelementptr inbounds float, ptr %y, i64 %i
  %left = sub i64 %n, %i
  %full = icmp uge i64 %left, 16
  br i1 %full, label %whole, label %part
whole:
  %raw.whole = load <16 x i16>, ptr %raw.i, align 2
  %out.whole = load <16 x i16>, ptr %out.i, align 2
  %y.whole = load <16 x float>, ptr %y.i, align 4
  br label %judge
part:
  %left.one = insertelement <16 x i64> poison, i64 %left, i64 0
  %left.all = shufflevector <16 x i64> %left.one, <16 x i64> poison, <16 x i32> zeroinitializer
  %inside.part = icmp ult <16 x i64> <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7, i64 8, i64 9, i64 10, i64 11, i64 12, i64 13, i64 14, i64 15>, %left.all
  %raw.part = call <16 x i16> @llvm.masked.load.v16i16.p0(ptr %raw.i, i32 2, <16 x i1> %inside.part, <16 x i16> zeroinitializer)
  %out.part = call <16 x i16> @llvm.masked.load.v16i16.p0(ptr %out.i, i32 2, <16 x i1> %inside.part, <16 x i16> zeroinitializer)
  %y.part = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %y.i, i32 4, <16 x i1> %inside.part, <16 x float> zeroinitializer)
  br label %judge
judge:
  %raw.bits = phi <16 x i16> [ %raw.whole, %whole ], [ %raw.part, %part ]
  %out.bits = phi <16 x i16> [ %out.whole, %whole ], [ %out.part, %part ]
  %change = phi <16 x float> [ %y.whole, %whole ], [ %y.part, %part ]
  %inside = phi <16 x i1> [ splat (i1 true), %whole ], [ %inside.part, %part ]
  %b = call <16 x float> @widened(<16 x i16> %raw.bits)
  %s = call <16 x float> @widened(<16 x i16> %out.bits)
  %less = fsub <16 x float> %b, %s
  %d = fadd <16 x float> %less, %change
  %size = call <16 x float> @llvm.fabs.v16f32(<16 x float> %d)
  %size.bits = bitcast <16 x float> %size to <16 x i32>
  %larger = call <16 x i32> @llvm.umax.v16i32(<16 x i32> %largest, <16 x i32> %size.bits)
  %square = fmul <16 x float> %change, %change
  %yy.more = fadd <16 x float> %yy, %square
  %lost = fmul <16 x float> %change, %d
  %yd.more = fadd <16 x float> %yd, %lost
  %z = fadd <16 x float> %b, %change
  %z.bits = bitcast <16 x float> %z to <16 x i32>
  %exponent = and <16 x i32> %z.bits, splat (i32 2139095040)
  %half.bits = sub <16 x i32> %exponent, splat (i32 67108864)
  %half = bitcast <16 x i32> %half.bits to <16 x float>   ; of the spacing of bfloat16 at z, or negative where no float is so small
  %most = fadd <16 x float> %size, %e.all
  %sure = fcmp olt <16 x float> %most, %half              ; not for a NaN
  %open = xor <16 x i1> %sure, splat (i1 true)
  %unsure = and <16 x i1> %open, %inside
  %flags = bitcast <16 x i1> %unsure to i16
  %none = icmp eq i16 %flags, 0
  br i1 %none, label %after, label %list
list:
  %index = add i64 %first, %i
  %index.one = insertelement <16 x i64> poison, i64 %index, i64 0
  %index.all = shufflevector <16 x i64> %index.one, <16 x i64> poison, <16 x i32> zeroinitializer
  %indices = add <16 x i64> %index.all, <i64 0, i64 1, i64 2, i64 3, i64 4, i64 5, i64 6, i64 7, i64 8, i64 9, i64 10, i64 11, i64 12, i64 13, i64 14, i64 15>
  %which.i = getelementptr inbounds i64, ptr %which, i64 %found
  call void @llvm.masked.compressstore.v16i64(<16 x i64> %indices, ptr %which.i, <16 x i1> %unsure)
  %count = call i16 @llvm.ctpop.i16(i16 %flags)
  %count.wide = zext i16 %count to i64
  %found.more = add i64 %found, %count.wide
  br label %after
after:
  %found.now = phi i64 [ %found, %judge ], [ %found.more, %list ]
  %next = add nuw nsw i64 %i, 16
  %end = icmp uge i64 %next, %n
  br i1 %end, label %done, label %loop
done:
  %top.now = call i32 @llvm.vector.reduce.umax.v16i32(<16 x i32> %larger)
  store i32 %top.now, ptr %top, align 4
  %yy.sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %yy.more)
  call void @sum(ptr %sums, float %yy.sum)
  %second = getelementptr inbounds double, ptr %sums, i64 1
  %yd.sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, <16 x float> %yd.more)
  call void @sum(ptr %second, float %yd.sum)
  ret i64 %found.now
}

define internal <16 x float> @widened(<16 x i16> %raw) alwaysinline {
  %wide = zext <16 x i16> %raw to <16 x i32>
  %bits = shl <16 x i32> %wide, splat (i32 16)
  %b = bitcast <16 x i32> %bits to <16 x float>
  ret <16 x float> %b
}

define internal float @single(ptr %place) alwaysinline {
  %raw = load i16, ptr %place, align 2
  %wide = zext i16 %raw to i32
  %bits = shl i32 %wide, 16
  %b = bitcast i32 %bits to float
  ret float %b
}

define internal void @sum(ptr %place, float %value) alwaysinline {
  %old = load double, ptr %place, align 8
  %wide = fpext float %value to double
  %new = fadd double %old, %wide
  store double %new, ptr %place, align 8
  ret void
}
