#!/usr/bin/perl
# A worker with no SDK: Perl's own modules only, the protocol of docs/functions.md. The subroutine `handler` is what the
# conformance suite asks for; put your own in its place.
use strict;
use warnings;

open(my $node, '+<&=', $ENV{EDGEWARD_WORKER_FD}) or die "no socket: $!";
binmode($node);

# -- msgpack: what the protocol has ------------------------------------------------------------------------------------

sub sized { my ($n, $small, $most, @codes) = @_;    # the head of something with a size
    return chr($small | $n) if $n < $most;
    return pack('CC', $codes[0], $n) if $codes[0] && $n < 256;
    return pack('Cn', $codes[1], $n) if $n < 65536;
    return pack('CN', $codes[2], $n);
}
sub text  { my $s = shift; utf8::encode($s) if utf8::is_utf8($s); return sized(length $s, 0xa0, 32, 0xd9, 0xda, 0xdb) . $s }
sub bytes { my $s = shift; return sized(length $s, 0, 0, 0xc4, 0xc5, 0xc6) . $s }
sub array { return sized(scalar @_, 0x90, 16, 0, 0xdc, 0xdd) . join('', @_) }
sub whole { return pack('CN', 0xce, shift) }
sub real  { return pack('Cd>', 0xcb, shift) }

our ($in, $at);
sub take { my $n = shift; my $s = substr($in, $at, $n); $at += $n; return $s }
sub many { my $n = shift; return [map { unpacked() } 1 .. $n] }
sub pairs { my $n = shift; my %h; for (1 .. $n) { my $k = unpacked(); $h{$k} = unpacked() } return \%h }
my %wide = (    # code => [bytes, template, what to do with the number]
    0xc4 => [1, 'C', \&take], 0xc5 => [2, 'n', \&take], 0xc6 => [4, 'N', \&take],
    0xd9 => [1, 'C', \&take], 0xda => [2, 'n', \&take], 0xdb => [4, 'N', \&take],
    0xcc => [1, 'C'], 0xcd => [2, 'n'], 0xce => [4, 'N'], 0xcf => [8, 'Q>'],
    0xd0 => [1, 'c'], 0xd1 => [2, 's>'], 0xd2 => [4, 'l>'], 0xd3 => [8, 'q>'],
    0xca => [4, 'f>'], 0xcb => [8, 'd>'],
    0xdc => [2, 'n', \&many], 0xdd => [4, 'N', \&many], 0xde => [2, 'n', \&pairs], 0xdf => [4, 'N', \&pairs],
);
sub unpacked {
    my $code = ord take(1);
    return $code if $code < 0x80;
    return pairs($code & 15) if $code < 0x90;
    return many($code & 15) if $code < 0xa0;
    return take($code & 31) if $code < 0xc0;
    return $code - 256 if $code >= 0xe0;
    return undef if $code == 0xc0;
    return $code - 0xc2 if $code == 0xc2 || $code == 0xc3;
    my $form = $wide{$code} or die "msgpack code $code";
    my $number = unpack($form->[1], take($form->[0]));
    return $form->[2] ? $form->[2]->($number) : $number;
}

# -- frames ------------------------------------------------------------------------------------------------------------

sub send_frame { my $payload = join '', @_; my $data = pack('N', length $payload) . $payload;
    while (length $data) {
        my $n = syswrite($node, $data);
        exit 0 unless defined $n;    # the node has gone
        substr($data, 0, $n, '');
    }
}
sub exactly { my $n = shift; my $data = '';
    while (length($data) < $n) {
        my $got = sysread($node, $data, $n - length($data), length($data));
        exit 0 unless $got;          # its end is the order to end
    }
    return $data;
}
sub headers { my %h = @_; return array(map { array(text($_), text($h{$_})) } sort keys %h) }

# -- the handler -------------------------------------------------------------------------------------------------------

my $most = 0;

sub handler { my ($id, $event) = @_;
    my ($eid, $source, $type, $data, $kind, $subject, $time, $more, $http) = @$event;
    $type =~ s/^conformance\.//;
    if ($type eq 'echo') { return result($id, $data, 200, 'content-type' => $kind || 'application/octet-stream') }
    if ($type eq 'attributes') {
        return result($id, join("\n", $eid, $source, "conformance.$type", $subject, $time, $more->{traceparent}), 200);
    }
    if ($type eq 'http') {
        my ($method, $path, $query, $headers, $client) = @$http;
        my $list = join ',', map { "$_->[0]=$_->[1]" } @$headers;
        return result($id, join("\n", $method, $path, $query, $list, $client), 200);
    }
    if ($type eq 'status') { return result($id, '', $data, 'x-conformance' => 'yes') }
    if ($type eq 'large') { return result($id, "\0" x $data, 200) }
    if ($type eq 'log') {
        send_frame(array(whole(23), text($id), whole(30), real(time), text($data), "\x80"));
        return result($id, '', 200);
    }
    if ($type eq 'stream') {
        send_frame(array(whole(19), text($id), whole(200), array()));
        send_frame(array(whole(20), text($id), bytes("piece $_\n"))) for 0 .. $data - 1;
        return send_frame(array(whole(21), text($id)));
    }
    die "no $type\n";
}
sub result { my ($id, $body, $status, %headers) = @_;
    if (length($body) > $most) {
        return send_frame(array(whole(22), text($id), text('too-large'), text('more than ' . $most), text('')));
    }
    send_frame(array(whole(18), text($id), bytes($body), whole($status), headers(%headers)));
}

while (1) {
    $in = exactly(unpack 'N', exactly(4));
    $at = 0;
    my $message = unpacked();
    if ($message->[0] == 0) {
        $most = $message->[8];
        send_frame(array(whole(16), whole(1), text('perl')));
    } elsif ($message->[0] == 1) {
        my $id = $message->[1];
        eval { handler($id, $message->[3]); 1 }
            or send_frame(array(whole(22), text($id), text('error'), text('Died'), text("$@")));
    }
}
