/* The state machines of an Extended Key Update for Spin 6: docs/fresh-keys.md, "Order of operations".

   Two ends, an ordered lossless channel in each direction (TLS over TCP). Either end may start
   updates at any time, so requests cross; a task may be cancelled while it waits for its KME; a
   responder may decline; either end may close. Keys are epoch numbers: a record names the epoch of
   the key that it was sealed with, and it opens only under the key of that epoch.

   One verifier serves all runs: the environment variable DROP says which rule is taken out, for the
   negative controls; CLOSES, whether the ends may close; UPDATES, how many each end starts. */

#define DATA 1      /* records of application data from each end */

/* The rules that a negative control takes out. */
#define TIE_BREAK 1          /* requests that cross: the lower one is ignored */
#define FINISH_FIRST 2       /* the initiator changes its sending key after its finish */
#define WAIT_FOR_FINISH 3    /* the responder changes its receiving key on the finish */
#define CONFIRM_FIRST 4      /* nothing comes under a new key before the confirmation */
#define ONE_AT_A_TIME 5      /* no update is started while one is under way */
#define CANCEL_WHOLLY 6      /* what is cancelled before it was sent leaves nothing behind */
#define SILENT_AFTER_CLOSE 7 /* an end that has sent close_notify sends no finish */
#define NEW_KEY_PAIRS 8      /* key pairs, and with them key_exchange values, are never used again */
#define ANSWERS 9            /* a responder answers in the end */
#define FINISHES 10          /* the initiator sends its finish at once */

mtype = { REQUEST, RESPONSE, DECLINE, FINISH, CONFIRM, APPLICATION, CLOSE };
mtype = { IDLE, FETCHING, WAITING, LOOKING_UP, FINISHING };

/* message, epoch of the key, value: key_exchange of a request, what a confirmation is about, number
   of a record of data */
chan wire[2] = [8] of { mtype, byte, byte };

typedef End {
  mtype state = IDLE;
  byte tx, rx;          /* epochs of the keys */
  byte reported;        /* the last epoch that the application was told of */
  byte mine, theirs;    /* key_exchange of our request, and of the one that we answer */
  byte agreed;          /* key_exchange of the request that made the newest epoch */
  bool confirming;      /* the next message under our new receiving key is a confirmation */
  bool closed, peer_closed, aborted;
  byte started, sent, received;
};
End end[2];
byte drop, closes, updates;
byte next_key[2];       /* key_exchange values: all different, whichever end has the higher one */

#define ME end[me]
#define PEER end[1 - me]
#define QUIET (len(wire[0]) == 0 && len(wire[1]) == 0)
#define AT_REST(i) (end[i].state == IDLE && !end[i].confirming)

inline send(kind, key, value) {
  assert(nfull(wire[me]));
  assert(!ME.closed);                                /* nothing follows close_notify */
  wire[me]!kind,key,value
}

inline report() {
  ME.reported++;
  assert(ME.reported == ME.rx);
  /* Both ends have the keys of this epoch, of the same exchange. */
  assert(PEER.tx == ME.reported && PEER.agreed == ME.agreed)
}

inline answer(value) {
  if
  :: ME.closed -> skip                               /* answers no request */
  :: else -> ME.theirs = value; ME.state = LOOKING_UP
  fi
}

proctype Endpoint(bit me)
{
  mtype kind; byte key, value;

  do
  /* The network brings a record. */
  :: atomic { !ME.aborted && wire[1 - me]?[kind,key,value] ->
       wire[1 - me]?kind,key,value;
       assert(key == ME.rx);                         /* else bad_record_mac */
       assert(!ME.peer_closed);
       if
       :: kind == CONFIRM ->
            assert(ME.confirming);
            assert(value == ME.agreed);              /* else decrypt_error */
            ME.confirming = false;
            report()
       :: kind == APPLICATION ->
            assert(!ME.confirming);                  /* else unexpected_message */
            assert(value == ME.received);
            ME.received++
       :: kind == CLOSE -> ME.peer_closed = true
       :: kind == REQUEST ->
            if
            :: ME.state == IDLE && !ME.confirming -> answer(value)
            :: ME.state == FETCHING -> answer(value) /* the key that we draw is dropped */
            :: ME.state == WAITING ->
                 if
                 :: drop == TIE_BREAK -> answer(value)
                 :: drop != TIE_BREAK && value < ME.mine -> skip
                 :: drop != TIE_BREAK && value > ME.mine -> answer(value)
                 :: drop != TIE_BREAK && value == ME.mine -> ME.aborted = true; assert(drop == NEW_KEY_PAIRS)
                 fi
            :: else -> assert(false)                 /* unexpected_message */
            fi
       :: kind == DECLINE ->
            assert(ME.state == WAITING);
            ME.state = IDLE
       :: kind == RESPONSE ->
            assert(ME.state == WAITING);
            assert(!ME.confirming);
            ME.agreed = ME.mine;
            ME.rx++;
            ME.confirming = true;
            ME.state = IDLE;
            if
            :: (ME.closed && drop != SILENT_AFTER_CLOSE) || drop == FINISHES -> skip
            :: else ->
                 if
                 :: drop == FINISH_FIRST -> ME.tx++; send(FINISH, ME.tx, 0)
                 :: else -> send(FINISH, ME.tx, 0); ME.tx++
                 fi;
                 send(CONFIRM, ME.tx, ME.agreed)
            fi
       :: kind == FINISH ->
            assert(ME.state == FINISHING);
            if
            :: drop != WAIT_FOR_FINISH -> ME.rx++
            :: else -> skip
            fi;
            ME.confirming = true;
            ME.state = IDLE
       fi }

  /* An update is due: ask the KME, if there is one; data goes on meanwhile. */
  :: atomic { !ME.aborted && ME.state == IDLE && !ME.closed && !ME.peer_closed && ME.started < updates &&
              (!ME.confirming || drop == ONE_AT_A_TIME) ->
       ME.state = FETCHING; ME.started++ }
  /* The task is cancelled, or the KME gives nothing: nothing was sent. */
  :: atomic { ME.state == FETCHING ->
       if
       :: drop == CANCEL_WHOLLY -> send(REQUEST, ME.tx, next_key[me])
       :: else -> skip
       fi;
       ME.state = IDLE }
  /* The key is there. Nobody knows which end has the higher value. */
  :: atomic { ME.state == FETCHING && !ME.closed ->
       if
       :: drop == NEW_KEY_PAIRS -> ME.mine = 1
       :: drop != NEW_KEY_PAIRS -> ME.mine = next_key[me]; next_key[me] = next_key[me] + 2
       :: drop != NEW_KEY_PAIRS -> ME.mine = next_key[me] + 100; next_key[me] = next_key[me] + 2
       fi;
       send(REQUEST, ME.tx, ME.mine);
       ME.state = WAITING }

  /* The responder knows whether it has the key that was named, or its look-up was cancelled. */
  :: atomic { ME.state == LOOKING_UP && !ME.closed && drop != ANSWERS ->
       send(DECLINE, ME.tx, 0);
       ME.state = IDLE }
  :: atomic { ME.state == LOOKING_UP && !ME.closed && drop != ANSWERS ->
       send(RESPONSE, ME.tx, 0);
       ME.agreed = ME.theirs;
       ME.tx++;
       if
       :: drop == WAIT_FOR_FINISH -> ME.rx++
       :: else -> skip
       fi;
       if
       :: drop == CONFIRM_FIRST && ME.sent < DATA -> send(APPLICATION, ME.tx, ME.sent); ME.sent++
       :: else -> skip
       fi;
       send(CONFIRM, ME.tx, ME.agreed);
       ME.state = FINISHING }

  /* Data, whatever goes on. */
  :: atomic { !ME.aborted && !ME.closed && ME.sent < DATA ->
       send(APPLICATION, ME.tx, ME.sent); ME.sent++ }

  /* close_notify, at any time; a task that asks the KME is cancelled by it. */
  :: atomic { closes && !ME.aborted && !ME.closed ->
       send(CLOSE, ME.tx, 0);
       ME.closed = true;
       if
       :: ME.state == FETCHING || ME.state == LOOKING_UP -> ME.state = IDLE
       :: else -> skip
       fi }

  /* Nothing more will happen. */
  :: atomic { QUIET && ((AT_REST(0) && AT_REST(1) && !closes && ME.started == updates && PEER.started == updates &&
                         ME.sent == DATA && PEER.sent == DATA) ||
                        (ME.closed && PEER.closed) || ME.aborted || PEER.aborted) -> break }
  od
}

/* Whenever both ends are at rest and nothing is under way, they have the same keys and say so. */
active proctype Together()
{
end_rest:
  atomic { QUIET && AT_REST(0) && AT_REST(1) && end[0].started + end[1].started > 0 &&
           !end[0].closed && !end[1].closed && !end[0].aborted && !end[1].aborted ->
    assert(end[0].tx == end[1].rx && end[1].tx == end[0].rx && end[0].tx == end[0].rx);
    assert(end[0].reported == end[0].rx && end[1].reported == end[0].reported);
    assert(end[0].agreed == end[1].agreed);
    goto end_rest }
}

init {
  atomic {
    c_code { now.drop = getenv("DROP") ? atoi(getenv("DROP")) : 0; };
    c_code { now.closes = getenv("CLOSES") ? atoi(getenv("CLOSES")) : 0; };
    c_code { now.updates = getenv("UPDATES") ? atoi(getenv("UPDATES")) : 2; };
    next_key[0] = 1; next_key[1] = 2;
    run Endpoint(0); run Endpoint(1)
  }
}

#define waits (end[0].state == WAITING || end[1].state == WAITING)
#define all_well (!closes && !end[0].aborted && !end[1].aborted)
ltl answered { [] ((waits && all_well) -> <> !waits) }
ltl completed { [] ((end[0].tx != end[1].tx && all_well) -> <> (end[0].tx == end[1].tx)) }
