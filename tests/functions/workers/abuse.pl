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

# What a function must not be able to do, tried.
sub handler { my ($id, $event) = @_;
    my ($what, $rest) = split / /, $event->[3], 2;
    return result($id, "$$", 200) if $what eq 'pid';
    if ($what eq 'memory') { my @held; push @held, 'x' x (1 << 20) while 1 }
    if ($what eq 'fork') {
        my $made = 0;
        while ($made < 10_000) {
            my $pid = fork;
            last unless defined $pid;
            unless ($pid) { sleep 600; exit }
            $made++;
        }
        return result($id, $made, 200);
    }
    if ($what eq 'loop') { 1 while 1 }
    if ($what eq 'huge') { syswrite($node, pack('N', 1 << 30)); sleep 600 }
    if ($what eq 'kill') { kill 'KILL', $$; sleep 600 }
    return result($id, tried($what, $rest) ? 'done' : 'refused: ' . ($! + 0), 200);
}
sub tried { my ($what, $rest) = @_;
    if ($what eq 'read') { return open(my $file, '<', $rest) }
    if ($what eq 'write') { return open(my $file, '>', $rest) }
    if ($what eq 'signal') { return kill('KILL', $rest) }
    my $to = pack('S n a4 x8', 2, $rest, "\x7f\0\0\1");    # struct sockaddr_in
    my $socket;
    if ($what eq 'tcp') { return socket($socket, 2, 1, 0) && connect($socket, $to) }
    if ($what eq 'udp') { return socket($socket, 2, 2, 0) && send($socket, 'x', 0, $to) }
    die "no $what\n";
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
